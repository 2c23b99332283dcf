"""The Hugging Face Hub, asked only where it can be reached: without a network its client tries for over a minute."""

import contextlib
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

SECONDS = 4.0  # that the Hub's host may take to answer


@contextlib.contextmanager
def quick_hub() -> Iterator[None]:
    """Within the block huggingface_hub takes what it has on this machine, and nothing else, where the Hub's host does
    not answer within `SECONDS`; what it then raises tells that it is offline."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or answers(constants.ENDPOINT):
        yield
        return
    constants.HF_HUB_OFFLINE = True
    _forget_connections()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False
        _forget_connections()


def hub_reason(error: Exception) -> str:
    """What an error of the Hub's client means, in a line."""
    from huggingface_hub.utils import LocalEntryNotFoundError, OfflineModeIsEnabled

    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return "the Hugging Face Hub cannot be reached, and its cache on this machine does not have the file"
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"


def answers(address: str) -> bool:
    """Whether anything, even a refusal, comes back from an address, by the proxies of the environment, in time."""
    found: list[bool] = []
    asking = threading.Thread(target=lambda: found.append(_asked(address)), daemon=True)
    asking.start()
    asking.join(SECONDS)  # the look-up of a name has no timeout of its own
    return bool(found and found[0])


def _asked(address: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=SECONDS):
            return True
    except urllib.error.HTTPError as error:
        return error.code not in (502, 503, 504)  # a proxy that cannot reach it
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # another certificate store may know it
    except OSError:
        return False


def _forget_connections() -> None:
    """Older versions of the client look at the setting only when a connection is made."""
    from huggingface_hub import utils

    getattr(utils, "reset_sessions", lambda: None)()
