'use strict';
const { model, images, codes } = JSON.parse(document.getElementById('data').textContent);
const $ = (id) => document.getElementById(id);
const L = model.levels, MARK = '#ff8c2a';
const state = { image: 0, depth: L, cell: null, level: 0, code: null };

const load = (url) => new Promise((done) => {
  const picture = new Image();
  picture.onload = () => done(picture);
  picture.src = url;
});

function element(tag, content, properties = {}) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...content);
  return made;
}

const gridOf = (image) => image.grids[state.level]; // rows, columns, pixels per token
const codesOf = (level) => codes[Math.min(level, codes.length - 1)]; // scales share theirs
const depthOf = (image) => Math.min(state.depth, image.made.length) - 1;
const cellsOf = (image, code, level) =>
  [...image.ids[level].keys()].filter((cell) => image.ids[level][cell] === code);
function corner(image, cell, size) {
  const columns = gridOf(image)[1];
  return [(cell % columns) * size, Math.floor(cell / columns) * size];
}

// A code decoded alone; where that cannot be, the first position that uses it.
function drawSwatch(canvas, code, level) {
  const context = canvas.getContext('2d'), { width, height } = canvas;
  context.clearRect(0, 0, width, height);
  context.imageSmoothingEnabled = false;
  const { picture, side, swatches } = codesOf(level);
  const user = images.find((image) => cellsOf(image, code, level).length), f = model.factor;
  if (swatches && code in swatches) {
    context.drawImage(picture, ...swatches[code], side, side, 0, 0, width, height);
  } else if (user) {
    const [cell] = cellsOf(user, code, level);
    context.drawImage(user.made.at(-1), ...corner(user, cell, f), f, f, 0, 0, width, height);
  }
}

const colorCache = {};
function decodedColor(code) {
  if (!colorCache[code]) {
    const { picture, side, swatches } = codes[0], [x, y] = swatches[code];
    const context = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
    context.imageSmoothingQuality = 'high';
    context.drawImage(picture, x + side / 4, y + side / 4, side / 2, side / 2, 0, 0, 1, 1);
    colorCache[code] = `rgb(${context.getImageData(0, 0, 1, 1).data.slice(0, 3).join()})`;
  }
  return colorCache[code];
}

const useColor = (share) => `hsl(${220 - 190 * share} 75% ${28 + 35 * share}%)`;

// The colors of a scale, and what the last of them means.
function legend(name, most, stops) {
  $(`${name}-scale`).style.background = `linear-gradient(90deg, ${stops.join()})`;
  $(`${name}-most`).textContent = most;
}

// A function of a code, for the tokens of one level.
function colors(level) {
  const kind = $('colors').value, counts = {};
  $('use-legend').hidden = kind !== 'used';
  if (kind === 'decoded' && codesOf(level).swatches) return decodedColor;
  if (kind !== 'used') {
    return (code) => {
      const n = Math.imul(code + 1, 2654435761) >>> 0;
      return `hsl(${n % 360} ${45 + ((n >>> 9) % 40)}% ${35 + ((n >>> 17) % 40)}%)`;
    };
  }
  for (const { ids } of images) ids[level].forEach((id) => { counts[id] = (counts[id] || 0) + 1; });
  const most = Math.max(2, ...Object.values(counts));
  legend('use', `${most} times`, [0, 0.25, 0.5, 0.75, 1].map(useColor));
  return (code) => useColor(Math.log(counts[code]) / Math.log(most));
}

// Gives a canvas the image's size times an integer.
function start(canvas, image, side, round) {
  const scale = Math.max(1, round(side / Math.max(image.width, image.height)));
  canvas.width = image.width * scale;
  canvas.height = image.height * scale;
  const context = canvas.getContext('2d');
  context.imageSmoothingEnabled = false;
  return [context, scale];
}

function drawError(image, made) {
  const { width, height } = image;
  const [a, b] = [image.picture, made].map((picture) => {
    const context = new OffscreenCanvas(width, height).getContext('2d');
    context.drawImage(picture, 0, 0);
    return { context, pixels: context.getImageData(0, 0, width, height) };
  });
  const gain = Number($('gain').value), stops = [[8, 8, 20], [181, 54, 122], [252, 253, 191]];
  legend('error', `${Math.round(255 / gain)} of 255`, stops.map((color) => `rgb(${color.join()})`));
  const from = a.pixels.data, to = b.pixels.data;
  for (let i = 0; i < from.length; i += 4) {
    let error = 0;
    for (let c = 0; c < 3; c++) error += Math.abs(from[i + c] - to[i + c]);
    const at = Math.min(1, (gain * error) / 765) * 2, k = Math.min(1, Math.floor(at));
    for (let c = 0; c < 3; c++) to[i + c] = stops[k][c] + (at - k) * (stops[k + 1][c] - stops[k][c]);
  }
  b.context.putImageData(b.pixels, 0, 0);
  const [context] = start($('error'), image, 448, Math.round);
  context.drawImage(b.context.canvas, 0, 0, $('error').width, $('error').height);
}

// A line around a cell; `out` of it lies outside, so that the cell is seen.
function outline(context, image, cell, size, color, line, out = 0) {
  const [x, y] = corner(image, cell, size), inset = line / 2 - out;
  context.strokeStyle = color;
  context.lineWidth = line;
  context.strokeRect(x + inset, y + inset, size - 2 * inset, size - 2 * inset);
}

function draw() {
  const image = images[state.image], depth = depthOf(image), made = image.made[depth];
  for (const [id, picture] of [['original', image.picture], ['made', made]]) {
    const [context] = start($(id), image, 448, Math.round);
    context.drawImage(picture, 0, 0, $(id).width, $(id).height);
  }
  drawError(image, made);
  const [context, scale] = start($('tokens'), image, 448, Math.round);
  const [rows, columns, pixels] = gridOf(image), size = pixels * scale, color = colors(state.level);
  for (const [cell, id] of image.ids[state.level].entries()) {
    context.fillStyle = color(id);
    context.fillRect(...corner(image, cell, size), size, size);
  }
  for (const cell of cellsOf(image, state.code, state.level)) {
    if (size >= 12) outline(context, image, cell, size, '#fff', size / 10);
    else outline(context, image, cell, size, MARK + 'cc', size / 2); // all of it
  }
  for (const id of state.cell === null ? [] : ['original', 'made', 'error', 'tokens']) {
    outline($(id).getContext('2d'), image, state.cell, size, '#000', 5, 5);
    outline($(id).getContext('2d'), image, state.cell, size, MARK, 3, 4);
  }
  $('quality').textContent =
    `${image.name}: ${image.width} x ${image.height}, ${columns} x ${rows} tokens, ` +
    `PSNR ${image.psnr[depth].toFixed(2)} dB`;
  $('gain-value').textContent = $('gain').value;
  $('depth-value').textContent = `${depth + 1} of ${L}`;
  [...$('thumbnails').children].forEach((button, i) =>
    button.setAttribute('aria-selected', String(i === state.image)));
  drawCode();
}

function drawCode() {
  const { code, level } = state, image = images[state.image];
  $('hint').hidden = code !== null;
  $('details').hidden = code === null;
  if (code === null) return;
  const uses = images.map((each) => cellsOf(each, code, level));
  const times = (n) => (n === 1 ? 'once' : `${n} times`);
  const where = state.cell === null ? '' :
    `row ${Math.floor(state.cell / gridOf(image)[1])}, column ${state.cell % gridOf(image)[1]}; `;
  $('name').textContent = `code ${code}`;
  $('counts').textContent =
    `${where}${times(uses[state.image].length)} in this image, ${times(uses.flat().length)} in all ${images.length}`;
  drawSwatch($('swatch'), code, level);
  $('levels').replaceChildren(...(L === 1 || model.sides || state.cell === null ? [] : Array.from({ length: L }, (_, i) =>
    element('button', [`${i + 1}: ${image.ids[i][state.cell]}`],
      { onclick: () => select(state.cell, i), ariaPressed: String(i === level) }))));
  const near = codesOf(level).neighbors[code];
  $('neighbors').replaceChildren(...(near || []).map(([id, distance]) => {
    const canvas = element('canvas', [], { width: 40, height: 40 });
    drawSwatch(canvas, id, level);
    return element('button', [canvas, String(id), element('small', [distance.toPrecision(3)])],
      { value: id, onclick: () => show({ cell: null, code: id }) });
  }));
  if (!near) $('neighbors').append(element('small', ['No image here uses this code.']));
  $('uses').replaceChildren(...images.flatMap((each, i) => (uses[i].length ? [use(each, i, uses[i])] : [])));
}

function use(image, number, cells) {
  const canvas = document.createElement('canvas');
  const [context, scale] = start(canvas, image, 128, Math.ceil), f = gridOf(image)[2];
  context.globalAlpha = 0.45;
  context.drawImage(image.picture, 0, 0, canvas.width, canvas.height);
  context.globalAlpha = 1;
  for (const cell of cells) {
    context.drawImage(image.picture, ...corner(image, cell, f), f, f, ...corner(image, cell, f * scale), f * scale, f * scale);
    outline(context, image, cell, f * scale, MARK, Math.max(1, (f * scale) / 6));
  }
  const onclick = () => show({ image: number, cell: cells[0] });
  return element('button', [canvas, `${cells.length}x`], { title: image.name, onclick });
}

function show(changed) {
  Object.assign(state, changed);
  draw();
}
const select = (cell, level = state.level) => show({ cell, level, code: images[state.image].ids[level][cell] });

function onClick(event) {
  const image = images[state.image], box = event.target.getBoundingClientRect();
  const [rows, columns, pixels] = gridOf(image);
  const x = Math.floor((((event.clientX - box.left) / box.width) * image.width) / pixels);
  const y = Math.floor((((event.clientY - box.top) / box.height) * image.height) / pixels);
  if (x >= 0 && y >= 0 && x < columns && y < rows) select(y * columns + x);
}

function onKey(event) {
  const [rows, columns] = gridOf(images[state.image]);
  const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] || [];
  if (dx === undefined || state.cell === null || !['BODY', 'CANVAS'].includes(event.target.tagName)) return;
  const x = (state.cell % columns) + dx, y = Math.floor(state.cell / columns) + dy;
  if (x >= 0 && x < columns && y >= 0 && y < rows) select(y * columns + x);
  event.preventDefault();
}

async function main() {
  document.title = $('title').textContent = model.name;
  $('about').textContent =
    `step ${model.step.toLocaleString('en')}, ${model.quantizer}, ${model.codebookSize.toLocaleString('en')} codes` +
    `${model.sides ? `, scales ${model.sides.join(', ')}` : L > 1 ? `, ${L} per position` : ''}, ${model.factor} x ${model.factor} pixels per token, model ${model.hash}`;
  for (const level of codes) if (level.sheet) level.picture = await load(level.sheet);
  for (const [number, image] of images.entries()) {
    image.picture = await load(image.original);
    image.made = await Promise.all(image.reconstructions.map(load));
    const thumbnail = Object.assign(image.picture.cloneNode(), { alt: image.name });
    const onclick = () => show({ image: number, cell: null, code: null });
    $('thumbnails').append(element('button', [thumbnail], { role: 'option', title: image.name, onclick }));
  }
  if (!codes[0].sheet) $('colors').options[0].remove();
  $('depth-control').hidden = !model.nested || L === 1;
  $('depth-name').textContent = model.sides ? 'scales' : 'codes per position';
  $('depth').max = $('depth').value = L;
  $('depth').oninput = (event) => {
    const depth = Number(event.target.value);
    show(model.sides ? { depth, level: depth - 1, cell: null, code: null } : { depth });
  };
  if (model.sides) state.level = L - 1;
  $('colors').onchange = $('gain').oninput = draw;
  for (const id of ['original', 'made', 'error', 'tokens']) $(id).onclick = onClick;
  document.addEventListener('keydown', onKey);
  draw();
  document.body.dataset.ready = 'yes';
}
main();
