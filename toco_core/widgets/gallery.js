// A grid of pictures with captions: click, or arrows and Enter, opens one.

function render({ model, el }) {
  const root = document.createElement("div");
  root.className = "toco-gallery";
  root.setAttribute("role", "listbox");
  root.setAttribute("aria-label", "gallery of the split");
  el.append(root);

  const draw = () => {
    const at = [...root.children].indexOf(document.activeElement);
    root.replaceChildren();
    for (const item of model.get("items")) {
      const button = document.createElement("button");
      button.type = "button";
      button.title = item.title;
      button.setAttribute("role", "option");
      button.setAttribute("aria-selected", item.index === model.get("chosen"));
      button.setAttribute("data-lm-suppress-shortcuts", "true");
      const frame = document.createElement("span");
      frame.className = "toco-frame";
      if (item.source) {
        const image = document.createElement("img");
        image.src = item.source;
        image.alt = item.title;
        frame.append(image);
      } else frame.textContent = item.words;
      const caption = document.createElement("span");
      caption.className = "toco-caption";
      caption.append(Object.assign(document.createElement("b"), { textContent: item.name }));
      caption.append(Object.assign(document.createElement("span"), { textContent: item.mark }));
      button.append(frame, caption);
      button.addEventListener("click", () => open(item.index));
      root.append(button);
    }
    if (at >= 0) root.children[Math.min(at, root.children.length - 1)]?.focus();
  };
  let count = 0;
  const open = (index) => {
    model.set("wanted", [index, ++count]);
    model.save_changes();
  };
  root.addEventListener("keydown", (event) => {
    const buttons = [...root.children];
    const at = buttons.indexOf(document.activeElement);
    if (at < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    const columns = buttons.filter((b) => b.offsetTop === buttons[0].offsetTop).length;
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
