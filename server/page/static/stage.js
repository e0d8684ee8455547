// The stage: what is being drawn, the chosen picture with its record, a sweep in a row, or why there is none.

import { $, button, copy, el, icon, plural, seconds } from './dom.js';
import { STAGES } from './jobs.js';
import { readable, recordOf } from './record.js';

const NAMES = { queue: 'Queue', prompt: 'Prompt', base: 'Base', swap: 'Swap', refiner: 'Refiner', decode: 'Decode' };
const SMALL = 300;
const EXAMPLES = {
  pair: ['a large red star on a blue background', 'a striped yellow circle on a green background',
    'a green ring on a white background', 'an orange cross on a black background'],
  model: ['a red fox in fresh snow, early morning light', 'a lighthouse in a storm, oil painting',
    'a bowl of ramen, studio photograph', 'a small house on a hill at night, paper cut'],
};

export class Stage {
  #here = $('stage');
  #shown = new Map();
  #urls = [];
  #act;

  /** `act` has again, sweep, use, start, remove, select, enlarge, cancel, retry, example and key. */
  constructor(act) {
    this.#act = act;
  }

  /** Show what `make` returns; what was shown before, and its pictures, are let go of first. */
  #show(kind, make) {
    for (const url of this.#urls.splice(0)) URL.revokeObjectURL(url);
    this.#shown.clear();
    const children = make().filter(Boolean);
    this.#here.className = `stage ${kind}`;
    this.#here.replaceChildren(...children);
    this.#here.setAttribute('aria-busy', String(kind.startsWith('drawing')));
  }

  #url(blob) {
    this.#urls.push(URL.createObjectURL(blob));
    return this.#urls.at(-1);
  }

  empty(facts) {
    const canvas = el('canvas', { width: 36, height: 20, 'aria-hidden': 'true' });
    paint(canvas);
    const examples = EXAMPLES[facts?.embedded ? 'pair' : 'model'];
    this.#show('empty', () => [el('div', { className: 'intro' }, canvas,
      el('h2', { textContent: 'Nothing here yet' }),
      el('p', { textContent: facts?.embedded
        ? 'This server runs the small pair that comes with it: it knows shapes, colours and patterns. Take one of these, or write your own.'
        : 'Say what the picture shows. Take one of these, or write your own.' }),
      el('div', { className: 'examples' }, ...examples.map((text) => el('button', {
        type: 'button', textContent: text, onclick: () => this.#act.example(text),
      }))))]);
  }

  /** Show jobs: one large, or several in a row. */
  drawing(jobs) {
    const single = jobs.length === 1;
    this.#show(single ? 'drawing' : 'drawing swept', () => [single ? null : title(jobs[0].settings),
      el('div', { className: single ? 'board' : 'board row' }, ...jobs.map((job) => this.#tile(job, single)))]);
    jobs.forEach((job) => this.update(job));
  }

  #tile(job, single) {
    const picture = el('img', { alt: 'A preview of the picture', hidden: true });
    const noise = el('canvas', { width: 48, height: 48, className: 'noise', 'aria-hidden': 'true' });
    grain(noise);
    const frame = el('div', { className: 'frame' }, noise, picture);
    frame.style.aspectRatio = job.settings.size.replace('x', ' / ');
    const bars = Object.fromEntries(STAGES.map((name) => [name, el('li', { className: name }, el('i'), el('span', { textContent: NAMES[name] }))]));
    if (job.settings.handoff === null) bars.swap.hidden = bars.refiner.hidden = true;
    const line = el('ol', { className: 'line', role: 'progressbar', 'aria-label': 'Progress', 'aria-valuemin': '0', 'aria-valuemax': '100' },
      ...Object.values(bars));
    const words = el('p', { className: 'words' });
    const left = el('p', { className: 'left' });
    const body = el('div', { className: 'progress' }, line, el('div', { className: 'under' }, words, left));
    const tile = el('figure', { className: single ? 'tile large' : 'tile' }, frame,
      single ? null : el('figcaption', {}, el('b', { textContent: place(job.settings) }), mini(job.of)), body);
    this.#shown.set(job, { tile, picture, noise, bars, line, words, left, single });
    return tile;
  }

  /** Show the news of a job that is on the stage. */
  update(job) {
    const shown = this.#shown.get(job);
    if (!shown) return;
    const { picture, noise, bars, line, words, left } = shown;
    if (job.preview && picture.src !== job.preview && job.state === 'running') {
      picture.src = job.preview;
      picture.hidden = false;
      noise.hidden = true;
    }
    const now = job.stage === 'send' ? 0 : job.stage === 'load' ? 1.5 : STAGES.indexOf(job.stage);
    STAGES.forEach((name, number) => {
      const part = name in job.done ? share(job, name) : Number(now > number);
      bars[name].style.setProperty('--done', part);
      bars[name].classList.toggle('now', job.state === 'running' && Math.floor(now) === number);
      if (name in job.of) bars[name].style.flexGrow = Math.max(job.of[name], 1);
    });
    const steps = job.of.base + job.of.refiner;
    const part = steps ? (job.done.base + job.done.refiner) / steps : 0;
    line.setAttribute('aria-valuenow', String(Math.round(part * 100)));
    line.setAttribute('aria-valuetext', told(job));
    words.textContent = told(job);
    left.textContent = job.left > 1 ? `about ${seconds(job.left)} left` : '';
    if (job.state === 'failed') this.#failed(job, shown);
    if (job.state === 'done' && !shown.single) this.#finished(job, shown);
    if (job.state === 'cancelled') words.textContent = 'Cancelled';
  }

  #finished(job, { tile }) {
    tile.replaceWith(this.#swept(job.item));
  }

  #failed(job, { tile, single }) {
    const { heading, advice, action } = explain(job.error);
    const said = job.error.status ? el('p', { className: 'message', textContent: job.error.message }) : null;
    const card = el('div', { className: 'failed', role: 'alert' }, icon('warn'), el('h2', { textContent: heading }), said,
      advice ? el('p', { textContent: advice }) : null);
    const near = /nearest size is (\d+x\d+)/.exec(job.error.message)?.[1];
    if (single && near) card.append(button('use', `Use ${near.replace('x', ' × ')}`, () => this.#act.resize(near), { className: 'act' }));
    else if (single && action) card.append(button('again', action, () => this.#act.retry(job), { className: 'act' }));
    tile.replaceChildren(card);
    if (!single) tile.append(el('figcaption', {}, el('b', { textContent: place(job.settings) })));
    if (single && job.error.retryAfter) countdown(card, job.error.retryAfter);
  }

  #swept(item) {
    const open = () => this.#act.select(item);
    const picture = el('img', { src: this.#url(item.blob), alt: place(item.settings), className: item.width < SMALL ? 'small' : '' });
    const frame = el('button', { type: 'button', className: 'frame', onclick: open, 'aria-label': `${place(item.settings)}: show it alone` }, picture);
    frame.style.aspectRatio = `${item.width} / ${item.height}`;
    return el('figure', { className: 'tile' }, frame,
      el('figcaption', {}, el('b', { textContent: place(item.settings) }), mini({ base: item.split[0], refiner: item.split[1] }),
        el('span', { className: 'hint', textContent: steps(item) })));
  }

  /** Show the pictures of a sweep in a row. */
  sweep(items) {
    this.#show('swept', () => [title(items[0].settings), el('div', { className: 'board row' }, ...items.map((item) => this.#swept(item)))]);
  }

  /** Show one picture; `around` is {number, count, swept}. */
  picture(item, around) {
    this.#show('picture', () => [this.#board(item, around), this.#about(item, around)]);
  }

  #board(item, around) {
    const { settings } = item;
    const picture = el('img', { src: this.#url(item.blob), alt: settings.prompt, className: item.width < SMALL ? 'small' : '' });
    const frame = el('button', { type: 'button', className: 'frame', 'aria-label': 'Show it large', onclick: () => this.#act.enlarge(item, picture.src) }, picture);
    frame.style.aspectRatio = `${item.width} / ${item.height}`;
    const step = (name, by, text) => el('button', { type: 'button', className: 'turn', 'aria-label': text, title: text, onclick: () => this.#act.turn(by) }, icon(name));
    const board = el('div', { className: 'board' }, el('figure', { className: 'tile large' }, frame));
    if (around.count > 1) board.append(step('back', -1, 'The picture before'), step('next', 1, 'The next picture'));
    return board;
  }

  #about(item, { number, count, swept }) {
    const { settings } = item;
    const act = this.#act;
    const facts = [
      [`${item.width} × ${item.height}`, 'Size'], [steps(item), 'Steps'], [item.seed, 'Seed'],
      [recordOf(item.texts).sampler ?? settings.sampler, 'Sampler'],
      [settings.guidance, 'Guidance'], settings.handoff !== null && settings.score !== null ? [settings.score, 'Score'] : null,
      item.start ? [`${Math.round(settings.strength * 100)} %`, 'Strength'] : null, [seconds(item.seconds), 'Drawn in'],
    ].filter(Boolean);
    const text = readable(item.texts);
    const name = `${settings.prompt.toLowerCase().replace(/[^a-z0-9]+/g, '-').slice(0, 40).replace(/^-|-$/g, '') || 'picture'}-${item.seed}.${item.blob.type.split('/')[1]}`;
    return el('div', { className: 'about' },
      el('div', { className: 'head' }, el('p', { className: 'prompt', textContent: settings.prompt }),
        el('span', { className: 'hint', textContent: `${number} of ${count}` })),
      settings.negative ? el('p', { className: 'hint', textContent: `without: ${settings.negative}` }) : null,
      mini({ base: item.split[0], refiner: item.split[1] }),
      el('dl', { className: 'facts' }, ...facts.map(([value, what]) => el('div', {}, el('dt', { textContent: what }), el('dd', { textContent: value })))),
      ...item.warnings.map((warning) => el('p', { className: 'note', textContent: warning })),
      el('div', { className: 'acts' },
        button('again', 'Same again', () => act.again(item), { id: 'again', title: 'Draw it again with the same settings and seed' }),
        act.sweeps() && !item.start ? button('sweep', 'Sweep the handoff', () => act.sweep(item), { id: 'sweep', title: 'The same seed with other handoffs, in a row' }) : null,
        button('use', 'Use settings', () => act.use(item), { id: 'use', title: 'Put its settings and seed into the form' }),
        button('picture', 'Start from it', () => act.start(item), { id: 'start-from' }),
        el('a', { className: 'button', href: this.#urls[0], download: name, id: 'download' }, icon('down'), el('span', { textContent: 'Download' })),
        swept > 1 ? button('sweep', 'See the sweep', () => act.group(item), { id: 'see-sweep' }) : null,
        button('bin', 'Delete', () => act.remove(item), { id: 'delete', className: 'risky' })),
      el('details', { className: 'record' }, el('summary', { textContent: 'Record' }),
        el('div', {}, button('copy', 'Copy', () => copy(text, 'Record'), { id: 'copy' }), el('pre', { tabIndex: 0, textContent: text }))));
  }
}

function title(settings) {
  return el('div', { className: 'title' }, el('h2', { textContent: 'The handoff, swept' }),
    el('p', { className: 'prompt', textContent: settings.prompt }),
    el('p', { className: 'hint', textContent: 'The same seed and settings; only the place differs where the refiner takes over.' }));
}

const place = ({ handoff }) => (handoff === null ? 'Base alone' : `Handoff ${Math.round(handoff * 100)} %`);
const steps = ({ split: [base, refiner] }) => (refiner ? `${base} + ${refiner}` : String(base));

function share(job, name) {
  return job.of[name] ? job.done[name] / job.of[name] : 0;
}

function told(job) {
  if (job.stage === 'queue') {
    const { place: number, seconds: left } = job.waiting;
    return number > 1 ? `Place ${number} in the queue, about ${seconds(left)}` : 'Next in the queue';
  }
  const words = { send: 'Sending', load: 'Loading the base', prompt: 'Reading the prompt', swap: 'Handing over to the refiner', decode: 'Decoding' };
  return words[job.stage] ?? `${NAMES[job.stage]}, step ${job.done[job.stage]} of ${job.of[job.stage]}`;
}

/** Return a small bar of the two experts' steps. */
function mini({ base, refiner }) {
  const parts = [['base', base], ['refiner', refiner]].filter(([, count]) => count).map(([name, count]) => {
    const part = el('i', { className: name });
    part.style.flexGrow = count;
    return part;
  });
  return el('span', { className: 'mini', role: 'img', 'aria-label': `base ${plural(base, 'step')}, refiner ${plural(refiner, 'step')}` }, ...parts);
}

/** Return what an error means, and what there is to do about it. */
function explain(error) {
  const { status, code } = error;
  if (status === 0) return { heading: 'The server does not answer', advice: 'Is it still running, and is this machine connected? Nothing is lost: the settings are still here.', action: 'Try again' };
  if (status === 429) return { heading: 'Many are drawing now', advice: 'Your settings are kept.', action: 'Try again' };
  if (status === 503 || code === 'not_ready') return { heading: 'The server takes no work now', advice: 'It is starting, stopping, or busy with another model.', action: 'Try again' };
  if (status === 504 || code === 'deadline_exceeded') return { heading: 'It took too long', advice: 'Fewer steps or a smaller size are drawn sooner.', action: 'Try again' };
  if (code === 'out_of_memory') return { heading: 'Too little memory', advice: 'Choose a smaller size.', action: 'Try again' };
  if (status === 401) return { heading: 'The server wants a key', advice: '', action: 'Enter a key' };
  if (status === 403) return { heading: 'The server refuses this page', advice: 'Open it under the address that the server was started with.', action: null };
  if (status === 400 || status === 413 || code === 'invalid_value') return { heading: 'This cannot be drawn', advice: '', action: null };
  return { heading: 'The picture failed', advice: '', action: 'Try again' };
}

function countdown(card, left) {
  const text = el('p', { className: 'hint' });
  card.append(text);
  const tick = () => {
    if (!card.isConnected) return;
    text.textContent = left > 0 ? `There may be a place in ${left} s.` : 'There may be a place now.';
    if (left > 0) setTimeout(tick, 1000);
    left -= 1;
  };
  tick();
}

/** Return numbers from 0 to 1 that are the same each time. */
function chance(seed) {
  let state = seed;
  return () => {
    state = Math.imul(state ^ (state >>> 15), 2246822519) + 0x9e3779b9 | 0;
    return ((state ^ (state >>> 13)) >>> 0) / 4294967296;
  };
}

function grain(canvas) {
  const context = canvas.getContext('2d');
  const pixels = context.createImageData(canvas.width, canvas.height);
  const next = chance(performance.now() | 1);
  for (let i = 0; i < pixels.data.length; i += 1) pixels.data[i] = i % 4 === 3 ? 255 : 90 + next() * 110;
  context.putImageData(pixels, 0, 0);
}

/** Paint what the model does: noise on the left, a picture on the right. */
function paint(canvas) {
  const { width, height } = canvas;
  const context = canvas.getContext('2d');
  const next = chance(7);
  for (let y = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1) {
      const colour = scene(x, y, width, height);
      const clear = Math.min(1, Math.max(0, (x / width) * 1.5 - 0.25));
      const mixed = colour.map((value) => Math.round(value * clear + (40 + next() * 190) * (1 - clear)));
      context.fillStyle = `rgb(${mixed.join()})`;
      context.fillRect(x, y, 1, 1);
    }
  }
}

function scene(x, y, width, height) {
  const sun = Math.hypot(x - width * 0.7, y - height * 0.42) < height * 0.24;
  const far = y > height * (0.68 + 0.1 * Math.sin(x / 4.2 + 1));
  const near = y > height * (0.82 + 0.08 * Math.sin(x / 3.1));
  if (near) return [38, 42, 92];
  if (far) return [70, 80, 168];
  if (sun) return [255, 157, 87];
  const down = y / height;
  return [150 + 90 * down, 160 + 40 * down, 235 - 40 * down];
}
