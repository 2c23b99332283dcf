// Into and out of the browser: a photograph is chosen, dropped on the explorer or pasted; a download is offered, a text
// goes to the clipboard.
// What is large, or of a kind that Python does not read, is redrawn here as a JPEG.

const KINDS = ["image/jpeg", "image/png", "image/bmp"];
const LARGEST = 5e6; // bytes of a message: servers close the connection at about 10 million
const SIDE = 2048; // pixels to which a larger photograph is reduced

function render({ model, el }) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "toco-door";
  button.textContent = "your photograph";
  button.title = "choose a file; or drop one anywhere on the explorer, or paste one (Ctrl+V)";
  const input = Object.assign(document.createElement("input"), { type: "file", accept: "image/*", multiple: true });
  input.hidden = true;
  const told = document.createElement("span");
  told.setAttribute("role", "status");
  el.append(button, input, told);

  const send = async (files) => {
    for (const file of files) {
      try {
        const whole = KINDS.includes(file.type) && file.size < LARGEST;
        const bytes = await (whole ? file : await redrawn(file)).arrayBuffer();
        model.send({ name: file.name || "pasted" }, undefined, [bytes]);
        told.textContent = "";
      } catch {
        told.textContent = ` ${file.name || "this"} is no image that the browser can read`;
      }
    }
  };
  const images = (list) => [...(list ?? [])].filter((file) => file.type.startsWith("image/") || !file.type);
  button.addEventListener("click", () => input.click());
  input.addEventListener("change", () => {
    send([...input.files]); // a copy: emptying the input empties its list
    input.value = "";
  });

  const explorer = () => el.getRootNode() && el.closest(".toco-explorer");
  const over = (event) => explorer()?.contains(event.target) && [...event.dataTransfer.types].includes("Files");
  const dragover = (event) => {
    explorer()?.classList.toggle("toco-dropping", over(event));
    if (over(event)) event.preventDefault();
  };
  const drop = (event) => {
    explorer()?.classList.remove("toco-dropping");
    if (!over(event)) return;
    event.preventDefault();
    event.stopPropagation();
    send([...event.dataTransfer.files]); // a copy: the list lives as long as the event
  };
  const paste = (event) => {
    const inside = explorer()?.contains(event.target) && !event.target.closest("input, textarea");
    const files = images(event.clipboardData?.files);
    if ((!inside && event.target !== document.body) || !files.length) return;
    event.preventDefault();
    send(files);
  };
  const listeners = { dragover, drop, paste };
  for (const [name, listener] of Object.entries(listeners)) document.addEventListener(name, listener, true);

  const receive = (content, buffers) => {
    const address = URL.createObjectURL(new Blob([buffers[0]], { type: content.kind }));
    Object.assign(document.createElement("a"), { href: address, download: content.name }).click();
    setTimeout(() => URL.revokeObjectURL(address), 60_000);
  };
  const copy = () => navigator.clipboard?.writeText(model.get("clipboard")[0]).catch(() => {});
  model.on("msg:custom", receive);
  model.on("change:clipboard", copy);
  return () => {
    model.off("msg:custom", receive);
    model.off("change:clipboard", copy);
    for (const [name, listener] of Object.entries(listeners)) document.removeEventListener(name, listener, true);
  };
}

async function redrawn(file) {
  const picture = await createImageBitmap(file); // turned as its EXIF says
  const scale = Math.min(1, SIDE / Math.max(picture.width, picture.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(picture.width * scale));
  canvas.height = Math.max(1, Math.round(picture.height * scale));
  canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
  return new Promise((done, fail) =>
    canvas.toBlob((blob) => (blob ? done(blob) : fail(new Error("empty"))), "image/jpeg", 0.95),
  );
}

export default { render };
