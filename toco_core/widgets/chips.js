// A row of chips that are switched on and off by a click: colour, name, number. Names are texts, never HTML.

function render({ model, el }) {
  const root = document.createElement("div");
  root.className = "toco-chips";
  root.setAttribute("role", "group");
  el.append(root);
  const next = () => (model.get("toggled").at(-1) ?? 0) + 1; // of all views that the model has or had
  const draw = () => {
    const focused = [...root.children].indexOf(document.activeElement);
    root.setAttribute("aria-label", model.get("label"));
    root.replaceChildren();
    for (const item of model.get("items")) {
      const button = document.createElement("button");
      button.type = "button";
      button.title = item.tip ?? "";
      button.disabled = model.get("disabled");
      button.setAttribute("aria-pressed", item.on);
      button.setAttribute("data-lm-suppress-shortcuts", "true");
      if (item.colour) {
        const swatch = document.createElement("i");
        swatch.style.background = item.colour;
        button.append(swatch);
      }
      button.append(Object.assign(document.createElement("span"), { textContent: item.name }));
      if (item.number) button.append(Object.assign(document.createElement("b"), { textContent: item.number }));
      button.addEventListener("click", () => {
        model.set("toggled", [item.name, next()]);
        model.save_changes();
      });
      root.append(button);
    }
    root.children[focused]?.focus();
  };
  for (const name of ["items", "label", "disabled"]) model.on("change:" + name, draw);
  draw();
}

export default { render };
