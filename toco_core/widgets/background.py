"""Work behind a widget: in a browser it runs in a thread, so that the kernel keeps answering sliders and clicks."""

import threading
from collections.abc import Callable
from typing import Any

import ipywidgets as w

from toco_core.errors import in_a_line
from toco_core.widgets.markup import Panel, element


class Background(w.VBox):
    """`Background(work, tell, live=...)`, shown as the last line of a cell: the sentences of `tell(work())`.

    `live`: they appear when the work is done, in a thread of its own. Otherwise it is done at once, and what it raises
    is raised here; the sentences are the object's text, which a notebook keeps.
    """

    def __init__(self, work: Callable[[], Any], tell: Callable[[Any], str], *, live: bool):
        self._panel = Panel()
        super().__init__([self._panel])
        self._work, self._tell, self.live = work, tell, live
        self.result: Any = None
        self.text = "measuring ..."
        self._show()
        self.thread = threading.Thread(target=self._run_live, name="measuring", daemon=True) if live else None
        if self.thread:
            self.thread.start()
        else:
            self._run()

    def settle(self, timeout: float = 60.0) -> None:
        """Wait until the work is done."""
        if self.thread:
            self.thread.join(timeout)

    def __repr__(self) -> str:
        return self.text

    def _repr_mimebundle_(self, **kwargs):
        bundle = super()._repr_mimebundle_(**kwargs) or {}
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        return {**data, "text/plain": repr(self)}, metadata

    def _run(self) -> None:
        self.result = self._work()
        self.text = self._tell(self.result)
        self._show()

    def _run_live(self) -> None:
        try:
            self._run()
        except Exception as error:  # noqa: BLE001  a thread's error is told where its result would be
            self.text = in_a_line(error)
            self._show()

    def _show(self) -> None:
        self._panel.put(element("div", self.text, style="white-space: pre-line"))
