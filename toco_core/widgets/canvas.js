// A picture that can be pointed at, one of a group that is zoomed, moved and pointed at together; with a second picture
// below the first it is a curtain. An overlay that grows stronger comes as its two ends, which are mixed here.
// Hover, click and keys travel to Python as fractions of the picture. What the window shows is the browser's affair.
// Keyboard: arrows move the chosen patch, n and p go to the next and the previous image, + - 0 zoom, e enlarges.
// Mouse: the wheel with Ctrl (or a pinch) zooms, dragging moves what is zoomed.

const MOST = 16; // times
const groups = (window.tocoGroups ??= {}); // group -> what its windows show, for pictures that come later

function render({ model, el }) {
  const make = (kind, name, parent) => {
    const made = document.createElement(kind);
    made.className = name;
    parent?.append(made);
    return made;
  };
  const root = make("div", "toco-canvas", el);
  const head = make("div", "toco-head", root);
  const title = make("span", "toco-title", head);
  const button = (text, tip, action) => {
    const made = make("button", "toco-tool");
    made.type = "button";
    made.textContent = text;
    made.title = tip;
    made.setAttribute("aria-label", tip);
    made.setAttribute("data-lm-suppress-shortcuts", "true");
    made.addEventListener("click", (event) => {
      action();
      event.stopPropagation(); // it is no click on the picture
    });
    return made;
  };
  const frame = make("div", "toco-frame", root);
  const below = make("div", "toco-layer", frame);
  const under = make("img", "toco-under", below);
  const layer = make("div", "toco-layer", frame);
  const image = make("img", "toco-picture", layer);
  const mix = make("div", "toco-mix", layer); // hides the picture while the overlay moves
  const ends = [make("img", "toco-without", mix), make("img", "toco-overlay", mix)];
  const marks = make("div", "toco-layer toco-marks", frame);
  const pin = make("i", "toco-pin", marks);
  const cross = make("i", "toco-cross", marks);
  const curtain = make("div", "toco-curtain", frame);
  const words = make("div", "toco-words", root);
  for (const picture of [image, under, ...ends]) picture.draggable = false;
  for (const picture of [under, ...ends]) picture.alt = "";
  image.tabIndex = 0;
  image.setAttribute("data-lm-suppress-shortcuts", "true"); // keys belong to the picture, not to the notebook
  curtain.tabIndex = 0;
  curtain.title = "drag, or use the arrow keys";
  curtain.setAttribute("role", "slider");
  curtain.setAttribute("aria-label", "curtain between two pictures");
  curtain.setAttribute("data-lm-suppress-shortcuts", "true");
  words.setAttribute("aria-live", "polite");

  // ---- what Python says

  const show = (bytes, target) => {
    if (bytes && bytes.byteLength) target.src = "data:image/jpeg;base64," + base64(bytes);
  };
  const showPicture = () => show(model.get("picture"), image);
  let changes = 0;
  const showEnds = async () => {
    const given = model.get("ends") ?? [], change = ++changes;
    given.forEach((bytes, i) => show(bytes, ends[i]));
    await Promise.allSettled(given.map((_, i) => ends[i].decode())); // one without the other is never seen
    if (change === changes && (given.length || image.complete)) mix.hidden = !given.length;
  };
  const showStrength = () => (ends[1].style.opacity = model.get("strength") ?? 0);
  image.addEventListener("load", () => {
    mix.hidden ||= !model.get("ends")?.length;
    frame.style.maxWidth = `${(90 * image.naturalWidth) / image.naturalHeight}vh`; // no picture higher than the window
  });
  const showUnder = () => {
    show(model.get("under"), under);
    const double = model.get("under")?.byteLength > 0;
    below.hidden = curtain.hidden = !double;
    moveCurtain(double ? share : 1);
  };
  const showWords = () => {
    words.textContent = model.get("words");
    title.textContent = title.title = model.get("title");
    head.hidden = !model.get("title");
    root.classList.toggle("toco-chosen", model.get("chosen"));
    tools.hidden = !model.get("group");
    image.alt = model.get("label");
    image.setAttribute("aria-label", model.get("label"));
    const width = model.get("width");
    root.style.setProperty("--toco-width", width ? width + "px" : "100%");
  };

  // ---- the window: z times enlarged, (y, x) in its middle

  const group = model.get("group");
  let shown = groups[group] ?? { z: 1, y: 0.5, x: 0.5 };
  const tell = (change) => {
    const detail = { group, ...change };
    if (group) window.dispatchEvent(new CustomEvent("toco", { detail }));
    else hear({ detail });
  };
  const hear = ({ detail }) => {
    if (detail.group !== group) return;
    if (detail.shown) {
      shown = groups[group] = detail.shown;
      place();
    }
    if ("at" in detail) {
      cross.hidden = !detail.at || detail.from === root;
      if (detail.at) put(cross, detail.at);
    }
  };
  const offset = () => [0.5 - shown.x * shown.z, 0.5 - shown.y * shown.z];
  const put = (mark, [y, x]) => {
    const [left, top] = offset();
    mark.at = [y, x];
    mark.style.left = 100 * (left + x * shown.z) + "%";
    mark.style.top = 100 * (top + y * shown.z) + "%";
  };
  const place = () => {
    const [left, top] = offset();
    for (const picture of [image, under, ...ends]) {
      picture.style.transform = `translate(${100 * left}%, ${100 * top}%) scale(${shown.z})`;
      picture.style.imageRendering = shown.z > 3 ? "pixelated" : "";
    }
    frame.classList.toggle("toco-zoomed", shown.z > 1);
    for (const mark of [pin, cross]) if (mark.at) put(mark, mark.at);
  };
  const look = (z, y, x) => {
    z = Math.min(Math.max(z, 1), MOST);
    const inside = (value) => Math.min(Math.max(value, 0.5 / z), 1 - 0.5 / z);
    tell({ shown: { z, y: inside(y), x: inside(x) } });
  };
  const zoom = (factor, at = model.get("pin").length ? model.get("pin") : [shown.y, shown.x]) => {
    const z = Math.min(Math.max(shown.z * factor, 1), MOST);
    const keep = (middle, point) => point + ((middle - point) * shown.z) / z; // the point stays where it is
    look(z, keep(shown.y, at[0]), keep(shown.x, at[1]));
  };
  const enlarge = () => {
    root.closest(".toco-row")?.querySelector("img.toco-picture").focus({ preventScroll: true }); // the one that stays
    send("enlarge", next("enlarge"));
  };
  const tools = make("span", "toco-tools", frame);
  tools.append(
    button("−", "zoom out (-)", () => zoom(1 / 1.5)),
    button("+", "zoom in (+, or the wheel with Ctrl)", () => zoom(1.5)),
    button("1:1", "whole picture (0)", () => look(1, 0.5, 0.5)),
    button("⤢", "enlarge, or all views again (e)", enlarge),
  );
  const showPin = () => {
    const at = model.get("pin");
    pin.hidden = !at.length;
    if (at.length) put(pin, at);
  };

  // ---- the curtain

  let share = 0.5;
  const moveCurtain = (to) => {
    const part = Math.min(Math.max(to, 0), 1);
    layer.style.clipPath = part < 1 ? `inset(0 ${100 * (1 - part)}% 0 0)` : "";
    curtain.style.left = 100 * part + "%";
    curtain.setAttribute("aria-valuenow", Math.round(100 * part));
    if (!curtain.hidden) share = part;
  };
  curtain.addEventListener("pointerdown", (event) => {
    curtain.setPointerCapture(event.pointerId);
    event.stopPropagation();
  });
  curtain.addEventListener("pointermove", (event) => {
    const box = frame.getBoundingClientRect();
    if (curtain.hasPointerCapture(event.pointerId)) moveCurtain((event.clientX - box.left) / box.width);
  });
  curtain.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -0.05, ArrowRight: 0.05, Home: -1, End: 1 }[event.key];
    if (!step) return;
    moveCurtain(share + step);
    event.preventDefault();
    event.stopPropagation();
  });

  // ---- what the reader does

  const where = (event) => {
    const box = image.getBoundingClientRect();
    const inside = (value) => Math.min(Math.max(value, 0), 0.999999);
    return [inside((event.clientY - box.top) / box.height), inside((event.clientX - box.left) / box.width)];
  };
  const next = (name) => ([model.get(name)].flat().at(-1) ?? 0) + 1; // of all views that the model has or had
  const send = (name, value) => {
    model.set(name, value);
    model.save_changes();
  };
  let from = null; // where a drag began
  frame.addEventListener("pointerdown", (event) => {
    from = { x: event.clientX, y: event.clientY, shown, moved: false };
  });
  frame.addEventListener("pointermove", (event) => {
    if (event.target.closest(".toco-curtain, .toco-tools")) return;
    const distance = from ? Math.hypot(event.clientX - from.x, event.clientY - from.y) : 0;
    if (from && event.buttons && shown.z > 1 && (from.moved || distance > 4)) {
      if (!from.moved) frame.setPointerCapture(event.pointerId);
      from.moved = true;
      const box = image.getBoundingClientRect();
      const by = [(event.clientY - from.y) / box.height, (event.clientX - from.x) / box.width];
      look(shown.z, from.shown.y - by[0], from.shown.x - by[1]);
      return;
    }
    const at = where(event);
    send("pointer", at);
    tell({ at, from: root });
  });
  frame.addEventListener("pointerleave", () => {
    send("pointer", []);
    tell({ at: null });
  });
  frame.addEventListener("click", (event) => {
    if (event.target.closest(".toco-curtain")) return;
    image.focus({ preventScroll: true });
    if (!from?.moved) send("click", [...where(event), next("click")]);
    from = null;
  });
  frame.addEventListener(
    "wheel",
    (event) => {
      if (!event.ctrlKey || !group) return; // the wheel alone scrolls the page
      event.preventDefault();
      zoom(Math.exp(-0.004 * event.deltaY), where(event));
    },
    { passive: false },
  );
  const keys = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  const zooms = { "+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5), 0: () => look(1, 0.5, 0.5) };
  image.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (keys[event.key]) send("step", [...keys[event.key], next("step")]);
    else if (event.key === "n" || event.key === "p") send("turn", [event.key === "n" ? 1 : -1, next("turn")]);
    else if (group && event.key === "e") enlarge();
    else if (group && zooms[event.key]) zooms[event.key]();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });

  window.addEventListener("toco", hear);
  model.on("change:picture", showPicture);
  model.on("change:ends", showEnds);
  model.on("change:strength", showStrength);
  model.on("change:under", showUnder);
  model.on("change:pin", showPin);
  for (const name of ["words", "label", "title", "width", "chosen"]) model.on("change:" + name, showWords);
  cross.hidden = true;
  mix.hidden = true;
  showPicture();
  showStrength();
  showEnds();
  showUnder();
  showWords();
  showPin();
  place();
  return () => window.removeEventListener("toco", hear);
}

// A picture within its address is there at once; the address of a blob goes through another process of the browser,
// which on a busy machine takes longer than all the rest.
function base64(view) {
  const bytes = new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
  if (bytes.toBase64) return bytes.toBase64();
  let text = "";
  for (let i = 0; i < bytes.length; i += 0x8000) text += String.fromCharCode(...bytes.subarray(i, i + 0x8000));
  return btoa(text);
}

export default { render };
