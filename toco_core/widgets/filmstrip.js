// A row of thumbnails: click, or arrows and Enter, chooses one. Also puts a text on the clipboard when asked to.

function render({ model, el }) {
  const root = document.createElement("div");
  root.className = "toco-film";
  root.setAttribute("role", "listbox");
  root.setAttribute("aria-label", "images");
  el.append(root);

  const draw = () => {
    const kept = root.contains(document.activeElement);
    root.replaceChildren();
    for (const item of model.get("items")) {
      const button = document.createElement("button");
      button.type = "button";
      button.title = item.title;
      button.setAttribute("role", "option");
      button.setAttribute("aria-selected", item.index === model.get("chosen"));
      button.setAttribute("data-lm-suppress-shortcuts", "true");
      button.tabIndex = item.index === model.get("chosen") ? 0 : -1;
      if (item.source) {
        const image = document.createElement("img");
        image.src = item.source;
        image.alt = item.title;
        button.append(image);
      } else {
        button.append(Object.assign(document.createElement("span"), { textContent: "unreadable" }));
      }
      if (item.mark) button.append(Object.assign(document.createElement("b"), { textContent: item.mark }));
      button.addEventListener("click", () => choose(item.index));
      root.append(button);
    }
    if (root.children.length && !root.querySelector('[tabindex="0"]')) root.children[0].tabIndex = 0;
    if (kept) root.querySelector('[tabindex="0"]')?.focus();
  };
  let count = 0;
  const choose = (index) => {
    model.set("wanted", [index, ++count]);
    model.save_changes();
  };
  root.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    const buttons = [...root.children];
    const next = buttons[buttons.indexOf(document.activeElement) + step];
    if (next) next.focus();
    event.preventDefault();
    event.stopPropagation();
  });
  const copy = () => {
    const text = model.get("clipboard")[0];
    if (text && navigator.clipboard) navigator.clipboard.writeText(text).catch(() => {});
  };
  model.on("change:items", draw);
  model.on("change:chosen", draw);
  model.on("change:clipboard", copy);
  draw();
}

export default { render };
