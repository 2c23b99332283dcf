// A picture that can be pointed at: hover, click and keys travel to Python as fractions of the picture.
// Keyboard: arrows move the chosen patch, n and p go to the next and the previous image.

function render({ model, el }) {
  const root = document.createElement("div");
  root.className = "toco-canvas";
  const image = document.createElement("img");
  image.tabIndex = 0;
  image.draggable = false;
  image.setAttribute("data-lm-suppress-shortcuts", "true"); // keys belong to the picture, not to the notebook
  const words = document.createElement("div");
  words.className = "toco-words";
  words.setAttribute("aria-live", "polite");
  root.append(image, words);
  el.append(root);

  const showPicture = () => {
    const bytes = model.get("picture");
    if (bytes && bytes.byteLength) image.src = "data:image/jpeg;base64," + base64(bytes);
  };
  const showWords = () => {
    words.textContent = model.get("words");
    image.alt = model.get("label");
    image.setAttribute("aria-label", model.get("label"));
    root.style.setProperty("--toco-width", model.get("width") + "px");
  };
  const place = (event) => {
    const box = image.getBoundingClientRect();
    const inside = (value) => Math.min(Math.max(value, 0), 0.999999);
    return [inside((event.clientY - box.top) / box.height), inside((event.clientX - box.left) / box.width)];
  };
  let count = 0;
  const send = (name, value) => {
    model.set(name, value);
    model.save_changes();
  };
  image.addEventListener("pointermove", (event) => send("pointer", place(event)));
  image.addEventListener("pointerleave", () => send("pointer", []));
  image.addEventListener("click", (event) => {
    image.focus({ preventScroll: true });
    send("click", [...place(event), ++count]);
  });
  const keys = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  image.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (keys[event.key]) send("step", [...keys[event.key], ++count]);
    else if (event.key === "n" || event.key === "p") send("turn", [event.key === "n" ? 1 : -1, ++count]);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  model.on("change:picture", showPicture);
  for (const name of ["words", "label", "width"]) model.on("change:" + name, showWords);
  showPicture();
  showWords();
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
