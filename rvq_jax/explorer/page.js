'use strict';
const data = JSON.parse(document.getElementById('data').textContent);
const { model, images } = data;
const $ = (id) => document.getElementById(id);
const L = model.codes;
// What is shown: an image, how many of its codes, a position, a code.
const state = { image: 0, depth: L, cell: null, level: 0, code: null };
const levels = Array.from({ length: L }, () => ({ neighbours: {}, sheets: [] }));

const load = (url) => new Promise((done) => {
  const picture = new Image();
  picture.onload = () => done(picture);
  picture.src = url;
});

async function addCodes(codes) {
  for (const [i, content] of codes.entries()) {
    Object.assign(levels[i].neighbours, content.neighbours);
    if (content.sheet) {
      levels[i].sheets.push({ ...content, picture: await load(content.sheet) });
    }
  }
}

async function addImage(image) {
  image.picture = await load(image.original);
  image.made = await Promise.all(image.reconstructions.map(load));
  const button = document.createElement('button');
  button.setAttribute('role', 'option');
  button.title = image.name;
  button.append(image.picture.cloneNode());
  button.firstChild.alt = image.name;
  const number = images.indexOf(image);
  button.onclick = () => showImage(number);
  $('thumbnails').append(button);
}

const idAt = (image, cell, level) => image.ids[cell * L + level];
const depthOf = (image) => Math.min(state.depth, image.made.length) - 1;

function place(code, level) {
  for (const sheet of levels[level].sheets) {
    const n = sheet.places[code];
    if (n !== undefined) {
      const y = Math.floor(n / sheet.columns);
      return [sheet, (n - y * sheet.columns) * sheet.side, y * sheet.side];
    }
  }
  return null;
}

// The code decoded alone; where that cannot be, the first place that uses it.
function drawSwatch(canvas, code, level) {
  const context = canvas.getContext('2d');
  context.imageSmoothingEnabled = false;
  const found = place(code, level);
  if (found) {
    const [sheet, x, y] = found;
    context.drawImage(sheet.picture, x, y, sheet.side, sheet.side, 0, 0, canvas.width, canvas.height);
    return;
  }
  for (const image of images) {
    const at = image.ids.findIndex((id, i) => i % L === level && id === code);
    if (at >= 0) {
      const cell = Math.floor(at / L), f = model.factor;
      const x = (cell % image.columns) * f, y = Math.floor(cell / image.columns) * f;
      context.drawImage(image.made.at(-1), x, y, f, f, 0, 0, canvas.width, canvas.height);
      return;
    }
  }
  context.fillStyle = '#888';
  context.font = '24px sans-serif';
  context.fillText('?', canvas.width / 2 - 6, canvas.height / 2 + 8);
}

const colourCache = {};
function decodedColour(code, level) {
  const key = `${level}/${code}`;
  if (!colourCache[key]) {
    const canvas = document.createElement('canvas');
    canvas.width = canvas.height = 1;
    const context = canvas.getContext('2d', { willReadFrequently: true });
    context.imageSmoothingQuality = 'high';
    const [sheet, x, y] = place(code, level);
    const half = sheet.side / 2; // its middle
    context.drawImage(sheet.picture, x + half / 2, y + half / 2, half, half, 0, 0, 1, 1);
    colourCache[key] = `rgb(${context.getImageData(0, 0, 1, 1).data.slice(0, 3).join()})`;
  }
  return colourCache[key];
}

function countAll(level) {
  const counts = new Map();
  for (const image of images) {
    for (let i = level; i < image.ids.length; i += L) {
      counts.set(image.ids[i], (counts.get(image.ids[i]) || 0) + 1);
    }
  }
  let most = 2;
  for (const count of counts.values()) most = Math.max(most, count);
  return { counts, most };
}

function tokenColour(code, level, { counts, most }) {
  const kind = $('colours').value;
  if (kind === 'decoded' && place(code, level)) return decodedColour(code, level);
  if (kind === 'used') {
    const share = Math.log(counts.get(code)) / Math.log(most);
    return `hsl(${220 - 190 * share} 75% ${28 + 35 * share}%)`;
  }
  const n = Math.imul(code + 1, 2654435761) >>> 0;
  return `hsl(${n % 360} ${45 + ((n >>> 9) % 40)}% ${35 + ((n >>> 17) % 40)}%)`;
}

// A canvas of the image's size times a whole number, ready to draw on.
function start(id, image) {
  const canvas = $(id);
  const scale = Math.max(1, Math.round(448 / Math.max(image.width, image.height)));
  canvas.width = image.width * scale;
  canvas.height = image.height * scale;
  const context = canvas.getContext('2d', { willReadFrequently: id === 'error' });
  context.imageSmoothingEnabled = false;
  return [canvas, context, scale];
}

const pixels = (picture, w, h) => {
  const canvas = new OffscreenCanvas(w, h);
  const context = canvas.getContext('2d');
  context.drawImage(picture, 0, 0);
  return [context.getImageData(0, 0, w, h), context, canvas];
};

function drawError(image, made) {
  const [canvas, context] = start('error', image);
  const { width: w, height: h } = image;
  const [a] = pixels(image.picture, w, h);
  const [b, target, small] = pixels(made, w, h);
  const gain = Number($('gain').value), stops = [[8, 8, 20], [181, 54, 122], [252, 253, 191]];
  for (let i = 0; i < a.data.length; i += 4) {
    let error = 0;
    for (let c = 0; c < 3; c++) error += Math.abs(a.data[i + c] - b.data[i + c]);
    const at = Math.min(1, (gain * error) / 765) * 2, k = Math.min(1, Math.floor(at));
    for (let c = 0; c < 3; c++) {
      b.data[i + c] = stops[k][c] + (at - k) * (stops[k + 1][c] - stops[k][c]);
    }
  }
  target.putImageData(b, 0, 0);
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
}

// A line around a cell; `out` of it lies outside, so that the cell is seen.
function outline(context, image, cell, size, colour, line, out = 0) {
  const x = cell % image.columns, y = Math.floor(cell / image.columns);
  const inset = line / 2 - out;
  context.strokeStyle = colour;
  context.lineWidth = line;
  context.strokeRect(x * size + inset, y * size + inset, size - 2 * inset, size - 2 * inset);
}

const cellsOf = (image) => {
  const cells = [];
  for (let i = state.level; i < image.ids.length; i += L) {
    if (image.ids[i] === state.code) cells.push((i - state.level) / L);
  }
  return cells;
};

function draw() {
  const image = images[state.image], depth = depthOf(image), made = image.made[depth];
  for (const [id, picture] of [['original', image.picture], ['made', made]]) {
    const [canvas, context] = start(id, image);
    context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  }
  drawError(image, made);
  const [, context, scale] = start('tokens', image);
  const size = model.factor * scale, counts = countAll(state.level);
  for (let cell = 0; cell < image.rows * image.columns; cell++) {
    context.fillStyle = tokenColour(idAt(image, cell, state.level), state.level, counts);
    context.fillRect((cell % image.columns) * size, Math.floor(cell / image.columns) * size, size, size);
  }
  if (state.code !== null) {
    for (const cell of cellsOf(image)) {
      if (size >= 12) outline(context, image, cell, size, '#fff', size / 10);
      else outline(context, image, cell, size, '#ff8c2acc', size / 2); // all of it
    }
  }
  if (state.cell !== null) {
    for (const id of ['original', 'made', 'error', 'tokens']) {
      const target = $(id).getContext('2d');
      outline(target, image, state.cell, size, '#000', 5, 5);
      outline(target, image, state.cell, size, '#ff8c2a', 3, 4);
    }
  }
  $('quality').textContent =
    `${image.name}: ${image.width} x ${image.height}, ${image.columns} x ${image.rows} tokens, ` +
    `PSNR ${image.psnr[depth].toFixed(2)} dB`;
  $('gain-value').textContent = $('gain').value;
  $('depth-value').textContent = `${depth + 1} of ${L}`;
  [...$('thumbnails').children].forEach((button, i) =>
    button.setAttribute('aria-selected', String(i === state.image)));
  drawCode();
}

function drawCode() {
  $('hint').hidden = state.code !== null;
  $('details').hidden = state.code === null;
  if (state.code === null) return;
  const { code, level } = state, uses = images.map(cellsOf);
  $('name').textContent = `code ${code}`;
  const where = state.cell === null ? '' :
    `row ${Math.floor(state.cell / images[state.image].columns)}, column ${state.cell % images[state.image].columns}; `;
  const total = uses.reduce((sum, cells) => sum + cells.length, 0);
  const times = (n) => (n === 1 ? 'once' : `${n} times`);
  $('counts').textContent = `${where}${times(uses[state.image].length)} in this image, ${times(total)} in all ${images.length}`;
  $('swatch').getContext('2d').clearRect(0, 0, 72, 72);
  drawSwatch($('swatch'), code, level);
  $('levels').replaceChildren(...(L === 1 || state.cell === null ? [] : Array.from({ length: L }, (_, i) => {
    const id = idAt(images[state.image], state.cell, i);
    const button = textButton(`${i + 1}: ${id}`, () => select(state.cell, i));
    button.setAttribute('aria-pressed', String(i === level));
    return button;
  })));
  const near = levels[level].neighbours[code] || [];
  $('neighbours').replaceChildren(...near.map(([id, distance]) => {
    const button = textButton('', () => { Object.assign(state, { cell: null, code: id }); draw(); });
    button.append(swatchOf(id, level), String(id), small(distance.toPrecision(3)));
    button.dataset.code = id;
    return button;
  }));
  if (!near.length) $('neighbours').append(small('not used in these images, so its neighbours are not in this page'));
  $('uses').replaceChildren(...images.flatMap((image, i) =>
    uses[i].length ? [use(image, i, uses[i])] : []));
}

function textButton(text, onclick) {
  const button = document.createElement('button');
  button.append(text);
  button.onclick = onclick;
  return button;
}
function small(text) {
  const element = document.createElement('small');
  element.textContent = text;
  return element;
}
function swatchOf(code, level) {
  const canvas = document.createElement('canvas');
  canvas.width = canvas.height = 40;
  drawSwatch(canvas, code, level);
  return canvas;
}

function use(image, number, cells) {
  const canvas = document.createElement('canvas');
  const scale = Math.max(1, Math.ceil(128 / Math.max(image.width, image.height)));
  canvas.width = image.width * scale;
  canvas.height = image.height * scale;
  const context = canvas.getContext('2d');
  context.globalAlpha = 0.45;
  context.drawImage(image.picture, 0, 0, canvas.width, canvas.height);
  context.globalAlpha = 1;
  const size = model.factor * scale;
  for (const cell of cells) {
    const x = (cell % image.columns) * size, y = Math.floor(cell / image.columns) * size;
    context.drawImage(image.picture, x / scale, y / scale, size / scale, size / scale, x, y, size, size);
    outline(context, image, cell, size, '#ff8c2a', Math.max(1, size / 6));
  }
  const button = textButton('', () => { state.image = number; state.cell = cells[0]; draw(); });
  button.title = image.name;
  button.append(canvas, `${cells.length}x`);
  return button;
}

function select(cell, level = state.level) {
  Object.assign(state, { cell, level, code: idAt(images[state.image], cell, level) });
  draw();
}
function showImage(number) {
  Object.assign(state, { image: number, cell: null, code: null });
  draw();
}

function onClick(event) {
  const image = images[state.image], box = event.target.getBoundingClientRect();
  const x = Math.floor((((event.clientX - box.left) / box.width) * image.width) / model.factor);
  const y = Math.floor((((event.clientY - box.top) / box.height) * image.height) / model.factor);
  if (x >= 0 && y >= 0 && x < image.columns && y < image.rows) select(y * image.columns + x);
}

function onKey(event) {
  const { columns, rows } = images[state.image];
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
  if (!step || state.cell === null || !['BODY', 'CANVAS'].includes(event.target.tagName)) return;
  const next = state.cell + step;
  const sameRow = Math.floor(next / columns) === Math.floor(state.cell / columns);
  if (next >= 0 && next < columns * rows && (Math.abs(step) > 1 || columns === 1 || sameRow)) select(next);
  event.preventDefault();
}

function say(text) {
  $('message').textContent = text;
  $('message').hidden = !text;
}

async function encode(file) {
  if (!file) return;
  if (!data.serves) {
    say('This page is a file and holds no model. To encode images of your own: python launch/explore.py --workdir=DIR --serve');
    return;
  }
  if (file.size > data.longestUpload) {
    const mib = (bytes) => (bytes / 2 ** 20).toLocaleString('en', { maximumFractionDigits: 1 });
    say(`expected an image of at most ${mib(data.longestUpload)} MiB, ${file.name} has ${mib(file.size)} MiB; shrink it`);
    return;
  }
  say(`encoding ${file.name} ...`);
  try {
    const answer = await fetch('/encode', { method: 'POST', body: file });
    if (!answer.ok) { say(await answer.text()); return; }
    const { image, codes } = await answer.json();
    image.name = file.name;
    images.push(image);
    await addCodes(codes);
    await addImage(image);
    say('');
    showImage(images.length - 1);
  } catch (error) {
    say(`the server does not answer: ${error.message}`);
  }
}

async function main() {
  document.title = $('title').textContent = model.name;
  $('about').textContent =
    `step ${model.step.toLocaleString('en')}, ${model.quantizer}, ${model.codebookSize.toLocaleString('en')} codes` +
    `${L > 1 ? `, ${L} a position` : ''}, ${model.factor} x ${model.factor} pixels a token, model ${model.hash}`;
  await addCodes(data.codes);
  for (const image of images) await addImage(image);
  if (!levels[0].sheets.length) $('colours').options[0].remove();
  $('depth-control').hidden = !model.residual || L === 1;
  $('depth').max = $('depth').value = L;
  $('depth').oninput = (event) => { state.depth = Number(event.target.value); draw(); };
  $('colours').onchange = $('gain').oninput = draw;
  for (const id of ['original', 'made', 'error', 'tokens']) $(id).onclick = onClick;
  document.addEventListener('keydown', onKey);
  $('file').onchange = (event) => encode(event.target.files[0]);
  document.addEventListener('dragover', (event) => { event.preventDefault(); $('drop').classList.add('over'); });
  document.addEventListener('dragleave', () => $('drop').classList.remove('over'));
  document.addEventListener('drop', (event) => {
    event.preventDefault();
    $('drop').classList.remove('over');
    encode(event.dataTransfer.files[0]);
  });
  draw();
  document.body.dataset.ready = 'yes';
}
main();
