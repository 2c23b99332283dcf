// A table whose rows can be chosen: a click or Enter travels to Python, which says what is chosen. Texts stay texts.

function render({ model, el }) {
  const table = document.createElement("table");
  table.className = "toco-table toco-rows";
  table.setAttribute("data-lm-suppress-shortcuts", "true"); // keys belong to the table, not to the notebook
  el.append(table);
  const next = () => (model.get("wanted").at(-1) ?? 0) + 1; // of all views that the model has or had
  const cell = (kind, text) => {
    const made = document.createElement(kind);
    made.textContent = text;
    return made;
  };
  const show = () => {
    const head = document.createElement("tr");
    head.append(...model.get("head").map((text) => cell("th", text)));
    const rows = model.get("rows").map((texts, i) => {
      const row = document.createElement("tr");
      row.append(...texts.map((text) => cell("td", text)));
      const mark = document.createElement("i");
      mark.style.background = model.get("colours")[i];
      row.firstChild.prepend(mark);
      row.tabIndex = 0;
      row.setAttribute("aria-selected", i === model.get("chosen"));
      const want = () => {
        model.set("wanted", [i, next()]);
        model.save_changes();
      };
      row.addEventListener("click", want);
      row.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        want();
        event.preventDefault();
        event.stopPropagation();
      });
      return row;
    });
    const at = [...table.rows].indexOf(document.activeElement);
    table.replaceChildren(...(rows.length ? [head, ...rows] : []));
    if (at > 0) table.rows[at]?.focus({ preventScroll: true });
  };
  for (const name of ["rows", "chosen"]) model.on("change:" + name, show);
  show();
}

export default { render };
