"use strict";
// One image under all settings: class activation maps are stored, everything else is worked out here.
const data = JSON.parse(document.getElementById("data").textContent);
const IGNORE = 255;
const byId = (id) => document.getElementById(id);
const made = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

// ---- stored pictures

async function pixels(source) {
  const image = new Image();
  image.src = source;
  await image.decode();
  const canvas = made("canvas", { width: image.naturalWidth, height: image.naturalHeight });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height);
}
const channel = (picture, c, scale = 1) => {
  const values = new Float32Array(picture.width * picture.height);
  for (let i = 0; i < values.length; i++) values[i] = picture.data[4 * i + c] * scale;
  return { width: picture.width, height: picture.height, values };
};

// ---- maps

function resized(map, width, height) {
  if (map.width === width && map.height === height) return map;
  const values = new Float32Array(width * height);
  const places = (to, from) =>
    Array.from({ length: to }, (_, i) => {
      const at = Math.max(((i + 0.5) * from) / to - 0.5, 0);
      const low = Math.min(Math.floor(at), from - 1);
      return [low, Math.min(low + 1, from - 1), at - low];
    });
  const columns = places(width, map.width);
  places(height, map.height).forEach(([y0, y1, fy], y) => {
    columns.forEach(([x0, x1, fx], x) => {
      const top = map.values[y0 * map.width + x0] * (1 - fx) + map.values[y0 * map.width + x1] * fx;
      const low = map.values[y1 * map.width + x0] * (1 - fx) + map.values[y1 * map.width + x1] * fx;
      values[y * width + x] = top * (1 - fy) + low * fy;
    });
  });
  return { width, height, values };
}

function neighbours(width, height, dy, dx) {
  const index = new Int32Array(width * height);
  const inside = (value, most) => Math.min(Math.max(value, 0), most - 1);
  for (let y = 0, i = 0; y < height; y++) {
    const row = inside(y + dy, height) * width;
    for (let x = 0; x < width; x++, i++) index[i] = row + inside(x + dx, width);
  }
  return index;
}

// Pixel-adaptive refinement: how much each pixel takes from its neighbours (toco_core/par.py).
function affinity(image, { dilations, colour_width, position_width, position_weight, eps }) {
  const [width, height] = [image.width, image.height];
  const offsets = dilations.flatMap((d) =>
    [-1, 0, 1].flatMap((y) => [-1, 0, 1].filter((x) => x || y).map((x) => [y * d, x * d])));
  const around = offsets.map(([dy, dx]) => neighbours(width, height, dy, dx));
  const n = width * height, count = offsets.length;
  const logits = around.map(() => new Float32Array(n));
  for (let c = 0; c < 3; c++) {
    const values = channel(image, c, 1 / 255).values;
    for (let i = 0; i < n; i++) {
      let mean = 0, spread = 0;
      for (let o = 0; o < count; o++) mean += values[around[o][i]];
      mean /= count;
      for (let o = 0; o < count; o++) spread += (values[around[o][i]] - mean) ** 2;
      const inverse = 1 / (colour_width * (Math.sqrt(spread / (count - 1)) + eps));
      for (let o = 0; o < count; o++) logits[o][i] -= ((values[around[o][i]] - values[i]) * inverse) ** 2 / 3;
    }
  }
  const distances = offsets.map(([dy, dx]) => Math.hypot(dy, dx));
  const middle = distances.reduce((a, b) => a + b) / count;
  const deviation = Math.sqrt(distances.reduce((a, d) => a + (d - middle) ** 2, 0) / (count - 1));
  const kernel = distances.map((d) => Math.exp(-((d / (position_width * (deviation + eps))) ** 2)));
  const total = kernel.reduce((a, b) => a + b);
  for (let i = 0; i < n; i++) {
    let most = -Infinity, sum = 0;
    for (let o = 0; o < count; o++) most = Math.max(most, logits[o][i]);
    for (let o = 0; o < count; o++) sum += logits[o][i] = Math.exp(logits[o][i] - most);
    for (let o = 0; o < count; o++) logits[o][i] = logits[o][i] / sum + (position_weight * kernel[o]) / total;
  }
  return { around, weights: logits };
}

function refined({ around, weights }, values, iterations) {
  for (let round = 0; round < iterations; round++) {
    const next = new Float32Array(values.length);
    for (let o = 0; o < around.length; o++) {
      const index = around[o], weight = weights[o];
      for (let i = 0; i < next.length; i++) next[i] += weight[i] * values[index[i]];
    }
    values = next;
  }
  return values;
}

// ---- labels, at the size of the stored maps: 0 background, i + 1 the i-th class, 255 uncertain

function strongest(maps) {
  const value = new Float32Array(maps[0].values.length), slot = new Uint8Array(value.length);
  maps.forEach(({ values }, k) => {
    for (let i = 0; i < values.length; i++) if (values[i] > value[i]) [value[i], slot[i]] = [values[i], k + 1];
  });
  return { value, slot };
}

function seedLabel(maps, low, high) {
  const { value, slot } = strongest(maps);
  return slot.map((k, i) => (value[i] <= low ? 0 : value[i] >= high ? k : IGNORE));
}

function pseudoLabel(maps, low, high, iterations) {
  const [height, width] = data.par.size, { width: W, height: H } = maps[0];
  const strength = maps.map((map) => resized(map, width, height).values.map(Math.exp));
  const total = (1 + data.par.position_weight) ** iterations;
  const labels = [high, low].map((beta) => {
    const sums = strength[0].map((_, i) => Math.exp(beta) + strength.reduce((a, s) => a + s[i], 0));
    const scores = strength.map((s) => refined(state.affinity, s.map((v, i) => v / sums[i]), iterations));
    const ground = scores[0].map((_, i) => total - scores.reduce((a, s) => a + s[i], 0));
    const all = [ground, ...scores].map((values) => resized({ width, height, values }, W, H).values);
    return Uint8Array.from(all[0], (best, i) => {
      let at = 0;
      for (let c = 1; c < all.length; c++) if (all[c][i] > best) [best, at] = [all[c][i], c];
      return at;
    });
  });
  return labels[0].map((k, i) => (k === 0 && labels[1][i] !== 0 ? IGNORE : k));
}

// ---- state

const state = { affinity: null, maps: {}, image: null, stored: {}, label: null, kept: {}, place: null };
const SHOWN = ["image", "CAM", "CAM label", "seed label", "pseudo label"];
if (data.segmentation) SHOWN.push("segmentation");
if (data.mask) SHOWN.push("ground truth");
const USES = { // what changes the picture, or its numbers: a CAM is scored by its label
  image: [], CAM: ["strength", "beta_l", "beta_h", ...(data.mask ? ["beta"] : [])], "CAM label": ["strength", "beta"], "seed label": ["strength", "beta_l", "beta_h"],
  "pseudo label": ["strength", "beta_l", "beta_h", "iterations"], segmentation: ["strength"], "ground truth": ["strength"],
};
const NEEDS_CAM = ["CAM", "CAM label", "seed label", "pseudo label"];
const value = (name) => Number(byId(name).value);
const shown = () => document.querySelector("[name=show]:checked").value;
const chosen = () => data.classes.map((_, k) => k).filter((k) => byId("class" + k).checked);
const row = () => data.rows[value("block")];

// The label that is shown, at the size of the stored maps, in places of data.names; null where there is none.
function labelOf(show) {
  if (show === "segmentation") return state.stored.segmentation;
  if (show === "ground truth") return state.stored.mask;
  const classes = chosen();
  const maps = classes.map((k) => state.maps[row().name][k]);
  const n = data.size[0] * data.size[1];
  if (!maps.length) return new Uint8Array(n);
  const key = [show, row().name, classes, value("beta"), value("beta_l"), value("beta_h"), value("iterations")].join();
  if (state.kept.key !== key) {
    let slots = null;
    if (show === "CAM" || show === "CAM label") {
      const { value: v, slot } = strongest(maps);
      slots = slot.map((k, i) => (v[i] > value("beta") ? k : 0));
    } else if (show === "seed label") slots = seedLabel(maps, value("beta_l"), value("beta_h"));
    else slots = pseudoLabel(maps, value("beta_l"), value("beta_h"), value("iterations"));
    const table = new Uint8Array(256);
    classes.forEach((k, i) => (table[i + 1] = data.classes[k].place));
    table[IGNORE] = IGNORE;
    state.kept = { key, label: slots.map((s) => table[s]) };
  }
  return state.kept.label;
}

// ---- pictures

function draw() {
  const show = shown(), strength = value("strength");
  const canvas = byId("picture"), context = canvas.getContext("2d");
  const picture = new ImageData(new Uint8ClampedArray(state.image.data), canvas.width, canvas.height);
  const [H, W] = data.size, out = picture.data;
  const nearest = (to, from) => Int32Array.from({ length: to }, (_, i) => Math.floor((i * from) / to));
  const rows = nearest(canvas.height, H), columns = nearest(canvas.width, W);
  state.label = show === "image" ? null : labelOf(show);
  if (show === "CAM" && chosen().length) {
    const { value: values } = strongest(chosen().map((k) => state.maps[row().name][k]));
    const cam = resized({ width: W, height: H, values }, canvas.width, canvas.height).values;
    const levels = [value("beta_l"), value("beta_h")];
    for (let i = 0; i < cam.length; i++) {
      const grey = (out[4 * i] + out[4 * i + 1] + out[4 * i + 2]) / 3;
      const colour = data.inferno[Math.round(cam[i] * 255)];
      for (let c = 0; c < 3; c++) {
        const ground = 0.35 * out[4 * i + c] + 0.65 * grey;
        out[4 * i + c] = ground * (1 - strength) + colour[c] * strength;
      }
    }
    levels.forEach((level, l) => {
      const line = l ? [255, 255, 255] : [120, 200, 255];
      for (let y = 1; y < canvas.height; y++)
        for (let x = 1; x < canvas.width; x++) {
          const i = y * canvas.width + x, here = cam[i] >= level;
          if (here !== cam[i - 1] >= level || here !== cam[i - canvas.width] >= level)
            for (let c = 0; c < 3; c++) out[4 * i + c] = line[c];
        }
    });
  } else if (state.label) {
    for (let y = 0, i = 0; y < canvas.height; y++)
      for (let x = 0; x < canvas.width; x++, i++) {
        const k = state.label[rows[y] * W + columns[x]];
        if (!k) continue;
        const colour = k === IGNORE ? ((x + y) % 6 < 2 ? [150, 150, 150] : [225, 225, 225]) : data.colours[k];
        for (let c = 0; c < 3; c++) out[4 * i + c] = out[4 * i + c] * (1 - strength) + colour[c] * strength;
      }
  }
  context.putImageData(picture, 0, 0);
  key(show);
  numbers(show);
  tell();
  byId("block_out").value = row().title;
  for (const name of ["strength", "beta", "beta_l", "beta_h", "iterations", "block"]) {
    if (name !== "block") byId(name + "_out").value = name === "iterations" ? value(name) : value(name).toFixed(2);
    const idle = name === "block" ? !NEEDS_CAM.includes(show) : !USES[show].includes(name);
    byId(name).closest(".row").classList.toggle("idle", idle);
  }
  document.body.dataset.drawn = Number(document.body.dataset.drawn || 0) + 1;
}

function key(show) {
  const box = byId("key");
  box.replaceChildren();
  if (show === "CAM") {
    const bar = made("span", { id: "bar" });
    bar.style.background = `linear-gradient(90deg, ${data.inferno.filter((_, i) => i % 15 === 0).map((c) => `rgb(${c})`)})`;
    box.append(made("span", {}, "0", bar, "1"), made("span", {}, "lines: beta_l (blue), beta_h (white)"));
  } else if (state.label) {
    for (const k of [...new Set(state.label)].sort((a, b) => a - b)) {
      const swatch = made("i");
      swatch.style.background = k === IGNORE
        ? "repeating-linear-gradient(135deg, #e1e1e1 0 3px, #969696 3px 5px)"
        : k ? `rgb(${data.colours[k]})` : "transparent";
      box.append(made("span", {}, swatch, k === IGNORE ? "uncertain" : data.names[k]));
    }
  }
}

// IoU over the pixels that mask and label decide, of the classes that either shows.
function numbers(show) {
  const table = byId("numbers");
  table.replaceChildren();
  if (!data.mask || !state.label || show === "ground truth") return;
  const both = new Map(), ofLabel = new Map(), ofMask = new Map();
  const add = (map, k) => map.set(k, (map.get(k) || 0) + 1);
  let decided = 0, named = 0;
  state.label.forEach((p, i) => {
    const t = state.stored.mask[i];
    if (t === IGNORE) return;
    named++;
    if (p === IGNORE) return;
    decided++;
    add(ofLabel, p);
    add(ofMask, t);
    if (p === t) add(both, p);
  });
  const what = show === "CAM" ? "CAM label, labelled pixels" : "labelled pixels";
  table.append(made("tr", {}, made("th", {}, `${what} ${((100 * decided) / named).toFixed(0)} %`), made("th", {}, "IoU, %")));
  for (const k of [...new Set([...ofLabel.keys(), ...ofMask.keys()])].sort((a, b) => a - b)) {
    const hit = both.get(k) || 0, all = (ofLabel.get(k) || 0) + (ofMask.get(k) || 0) - hit;
    table.append(made("tr", {}, made("td", {}, data.names[k]), made("td", {}, ((100 * hit) / all).toFixed(1))));
  }
}

function point(event) {
  const box = byId("picture").getBoundingClientRect(), inside = (value) => Math.min(Math.max(value, 0), 0.999999);
  state.place = [inside((event.clientY - box.top) / box.height), inside((event.clientX - box.left) / box.width)];
  tell();
}

// What is at the place that was pointed at last, under the settings of now.
function tell() {
  if (!state.place) return;
  const [y, x] = state.place, [H, W] = data.size;
  const at = Math.floor(y * H) * W + Math.floor(x * W);
  const word = (k) => (k === IGNORE ? "uncertain" : data.names[k]);
  const words = [`row ${Math.floor(y * data.native[0])}, column ${Math.floor(x * data.native[1])}`];
  chosen().forEach((k) => words.push(`${data.classes[k].name} ${state.maps[row().name][k].values[at].toFixed(2)}`));
  if (state.label && shown() !== "CAM") words.push(`${shown()}: ${word(state.label[at])}`);
  if (state.stored.mask) words.push(`truth: ${word(state.stored.mask[at])}`);
  byId("words").textContent = words.join(" · ");
}

// ---- controls

function slider(name, title, tip, options) {
  const input = made("input", { type: "range", id: name, ...options });
  return made("div", { className: "row", title: tip },
    made("label", { htmlFor: name }, title), input, made("output", { id: name + "_out", htmlFor: name }));
}

function controls() {
  const show = made("fieldset");
  SHOWN.forEach((name) => {
    const input = made("input", { type: "radio", name: "show", value: name, checked: name === data.show });
    show.append(made("label", {}, input, name));
  });
  const classes = made("fieldset", { title: "which classes are shown and become labels" });
  data.classes.forEach((one, k) => {
    const swatch = made("i");
    swatch.style.background = `rgb(${data.colours[one.place]})`;
    const input = made("input", { type: "checkbox", id: "class" + k, checked: one.on });
    classes.append(made("label", {}, input, swatch, `${one.name} ${one.score.toFixed(2)}`));
  });
  const unit = { min: 0, max: 1, step: 0.01 };
  byId("controls").append(
    show,
    classes,
    slider("block", "CAM of", "an inner block's CAM is the final norm and classifier on its tokens",
      { min: 0, max: data.rows.length - 1, step: 1, value: data.row }),
    slider("strength", "overlay", "0 shows the image only", { ...unit, value: data.strength }),
    slider("beta_l", "beta_l", "CAM at most this is background", { ...unit, value: data.beta_l }),
    slider("beta_h", "beta_h", "CAM at least this is the class; uncertain between the two", { ...unit, value: data.beta_h }),
    slider("beta", "beta", "the one threshold of the CAM label", { ...unit, value: data.beta }),
    slider("iterations", "PAR iterations", "rounds of pixel-adaptive refinement", { min: 0, max: 30, step: 1, value: data.par.iterations }),
    made("table", { id: "numbers" }),
  );
  const order = (moved) => { // beta_l stays below beta_h: a threshold that is moved past the other one pushes it along
    if (value("beta_l") < value("beta_h")) return;
    if (moved === "beta_l") byId("beta_h").value = value("beta_l") + 0.01;
    else byId("beta_l").value = value("beta_h") - 0.01;
    if (value("beta_l") >= value("beta_h")) {
      byId("beta_l").value = Math.min(value("beta_l"), 0.99);
      byId("beta_h").value = value("beta_l") + 0.01;
    }
  };
  let waiting = false;
  byId("controls").addEventListener("input", (event) => {
    if (["beta_l", "beta_h"].includes(event.target.id)) order(event.target.id);
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      draw();
    });
  });
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  for (const event of ["pointermove", "pointerdown"]) byId("picture").addEventListener(event, point);
}

async function begin() {
  byId("title").textContent = data.title;
  byId("about").textContent = data.about;
  const canvas = byId("picture");
  state.image = await pixels(data.image);
  [canvas.width, canvas.height] = [state.image.width, state.image.height];
  canvas.style.maxWidth = `${(90 * canvas.width) / canvas.height}vh`; // a tall picture leaves room for the controls
  for (const { name, maps } of data.rows)
    state.maps[name] = await Promise.all(maps.map(async (source) => channel(await pixels(source), 0, 1 / 255)));
  for (const name of ["segmentation", "mask"])
    if (data[name]) state.stored[name] = Uint8Array.from(channel(await pixels(data[name]), 0).values);
  state.affinity = affinity(await pixels(data.par.image), data.par);
  controls();
  draw();
}
begin().catch((error) => (byId("about").textContent = "This page cannot be shown: " + error.message));
