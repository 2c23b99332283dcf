// Pictures to choose from, a strip or, with captions, a grid: a click, or arrows and Enter, chooses one. Names are texts.

function render({ model, el }) {
  const captions = model.get("captions");
  const root = document.createElement("div");
  root.className = captions ? "toco-gallery" : "toco-film";
  root.setAttribute("role", "listbox");
  root.setAttribute("aria-label", model.get("label"));
  el.append(root);
  const text = (kind, words) => Object.assign(document.createElement(kind), { textContent: words });

  const content = (item) => {
    const picture = item.source ? document.createElement("img") : text("span", item.words);
    if (item.source) [picture.src, picture.alt] = [item.source, item.title];
    const mark = item.mark ? [text(captions ? "span" : "b", item.mark)] : [];
    if (!captions) return [picture, ...mark];
    const [frame, caption] = [text("span", ""), text("span", "")];
    [frame.className, caption.className] = ["toco-thumbnail", "toco-caption"];
    frame.append(picture);
    caption.append(text("b", item.name), ...mark);
    return [frame, caption];
  };
  const next = () => (model.get("wanted").at(-1) ?? 0) + 1; // of all views that the model has or had
  const draw = () => {
    const at = [...root.children].indexOf(document.activeElement);
    const chosen = model.get("chosen");
    root.replaceChildren();
    for (const item of model.get("items")) {
      const button = document.createElement("button");
      button.type = "button";
      button.title = item.title;
      button.setAttribute("role", "option");
      button.setAttribute("aria-selected", item.index === chosen);
      button.setAttribute("data-lm-suppress-shortcuts", "true");
      button.tabIndex = item.index === chosen ? 0 : -1; // one stop of the tab key; arrows lead to the others
      button.append(...content(item));
      button.addEventListener("click", () => {
        model.set("wanted", [item.index, next()]);
        model.save_changes();
      });
      root.append(button);
    }
    const stop = root.querySelector('[tabindex="0"]') ?? root.children[0];
    if (stop) stop.tabIndex = 0;
    if (at >= 0) (captions ? root.children[Math.min(at, root.children.length - 1)] : stop)?.focus();
  };
  root.addEventListener("keydown", (event) => {
    const buttons = [...root.children];
    const at = buttons.indexOf(document.activeElement);
    if (at < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    const columns = buttons.filter((button) => button.offsetTop === buttons[0].offsetTop).length;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    if (!step) return;
    buttons[at + step]?.focus();
    event.preventDefault();
    event.stopPropagation();
  });
  model.on("change:items", draw);
  model.on("change:chosen", draw);
  draw();
}

export default { render };
