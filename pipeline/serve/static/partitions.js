// A partition's canvas: kept patches in colour or attention as heat, padding hatched.

// Of no attention and of the most; the key in playground.css shows the same.
const STOPS = [[22, 11, 57], [106, 23, 110], [188, 55, 84], [243, 120, 25], [252, 255, 164]];
const HEAT = Array.from({ length: 256 }, (_, value) => heat(value / 255));
// Dropped patches have a third of their light and no colour, and are not quite black.
const DIMMED = 0.36, FLOOR = [15, 17, 22];
// Pixels of a canvas at least, so that the edges of patches stay sharp.
const DRAWN_SIDE = 576;

/** A figure for the picture of partition ``index``, ``side`` pixels wide: {figure, canvas, lit, dim}. */
export async function makeTile(picture, index, side) {
  const image = new Image();
  image.src = picture;
  await image.decode();
  const scale = Math.ceil(DRAWN_SIDE / side);
  const lit = sheet(side * scale);
  const pen = lit.getContext("2d", { willReadFrequently: true });
  pen.drawImage(image, 0, 0, lit.width, lit.height);
  const dim = sheet(lit.width);
  dim.getContext("2d").putImageData(dimmed(pen.getImageData(0, 0, lit.width, lit.height)), 0, 0);
  const figure = document.getElementById("tile").content.firstElementChild.cloneNode(true);
  const canvas = figure.querySelector("canvas");
  canvas.width = canvas.height = lit.width;
  figure.querySelector(".name").append(...(index ? [prefix(), `${index}`] : ["Full-image"]));
  return { figure, canvas, lit, dim };
}

/** What a narrow tile leaves out. */
const prefix = () => Object.assign(document.createElement("span"), { textContent: "Sub-image " });
const nameOf = (index) => (index ? `Sub-image ${index}` : "Full-image");
const sheet = (side) => Object.assign(document.createElement("canvas"), { width: side, height: side });

function dimmed(pixels) {
  const { data } = pixels;
  for (let at = 0; at < data.length; at += 4) {
    const light = (0.3 * data[at] + 0.59 * data[at + 1] + 0.11 * data[at + 2]) * DIMMED;
    for (let channel = 0; channel < 3; channel++) data[at + channel] = light + FLOOR[channel];
  }
  return pixels;
}

function heat(share) {
  const place = share * (STOPS.length - 1);
  const first = Math.min(Math.floor(place), STOPS.length - 2);
  return `rgb(${STOPS[first].map((from, channel) => Math.round(from + (place - first) * (STOPS[first + 1][channel] - from))).join(" ")})`;
}

/** Draws partition ``index`` of ``sight``, with its ``attention`` a patch, 0 to 255, if that is to be seen. */
export function drawTile({ figure, canvas, lit, dim }, index, sight, attention) {
  const { patches_per_side: patches, side, patch_size: patchSize } = sight;
  const { kept, padding, num_real: real } = sight.partitions[index];
  const size = (canvas.width / side) * patchSize;
  const place = (patch) => [(patch % patches) * size, Math.floor(patch / patches) * size];
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  pen.drawImage(dim, 0, 0);
  if (attention) {
    pen.globalAlpha = 0.66;
    attention.forEach((value, patch) => {
      pen.fillStyle = HEAT[value];
      pen.fillRect(...place(patch), size, size);
    });
    pen.globalAlpha = 1;
    outline(pen, new Set(kept), patches, size);
  } else {
    for (const patch of kept) pen.drawImage(lit, ...place(patch), size, size, ...place(patch), size, size);
  }
  hatch(pen, padding.map(place), size);
  figure.dataset.kept = kept.length;
  figure.querySelector(".count b").textContent = kept.length;
  figure.querySelector(".count span").textContent = ` / ${real}`;
  figure.querySelector(".meter i").style.width = `${real ? (100 * kept.length) / real : 0}%`;
  canvas.setAttribute("aria-label", `${nameOf(index)}: ${kept.length} of ${real} tokens kept`);
}

/** Lines around kept patches, where their neighbour is none. */
function outline(pen, kept, patches, size) {
  const lines = new Path2D();
  for (const patch of kept) {
    const col = patch % patches, row = Math.floor(patch / patches), x = col * size, y = row * size;
    const edges = [
      [row > 0 && kept.has(patch - patches), x, y, x + size, y],
      [row < patches - 1 && kept.has(patch + patches), x, y + size, x + size, y + size],
      [col > 0 && kept.has(patch - 1), x, y, x, y + size],
      [col < patches - 1 && kept.has(patch + 1), x + size, y, x + size, y + size],
    ];
    for (const [joined, ...line] of edges) {
      if (joined) continue;
      lines.moveTo(line[0], line[1]);
      lines.lineTo(line[2], line[3]);
    }
  }
  pen.lineCap = "square";
  for (const [width, colour] of [[6, "rgb(0 0 0 / .6)"], [3, "#fff"]]) {
    pen.lineWidth = width;
    pen.strokeStyle = colour;
    pen.stroke(lines);
  }
}

function hatch(pen, places, size) {
  if (!places.length) return;
  const colours = getComputedStyle(document.documentElement);
  pen.save();
  const area = new Path2D();
  for (const [x, y] of places) area.rect(x, y, size, size);
  pen.clip(area);
  pen.fillStyle = colours.getPropertyValue("--sunken");
  pen.fillRect(0, 0, pen.canvas.width, pen.canvas.height);
  pen.strokeStyle = colours.getPropertyValue("--hatch");
  pen.lineWidth = 3;
  pen.beginPath();
  for (let x = -pen.canvas.height; x < pen.canvas.width; x += 18) {
    pen.moveTo(x, pen.canvas.height);
    pen.lineTo(x + pen.canvas.height, 0);
  }
  pen.stroke();
  pen.restore();
}
