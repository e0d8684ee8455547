// The page put together: what is drawn, what is shown, and keys.

import { $, el, icon, plural, say, toast } from './dom.js';
import { getJSON, Refused, setKey } from './api.js';
import { Form } from './form.js';
import { Gallery } from './gallery.js';
import { Job } from './jobs.js';
import { Stage } from './stage.js';

const THEME = 'trt-serve.theme';
const SWEPT = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4];
const MOST_SWEPT = 4;

let running = [];
let watching = true;
const form = new Form(() => {});
const gallery = new Gallery((item) => show(item));
const stage = new Stage({
  again: (item) => draw([{ ...item.settings }], item.start),
  sweep: (item) => sweep(item),
  use: (item) => use(item),
  start: (item) => { form.startFrom(item.blob); $('start-card').scrollIntoView({ block: 'center' }); say('The next picture starts from this one'); },
  remove: (item) => gallery.remove(item),
  select: (item) => show(item),
  group: (item) => { gallery.mark(null); stage.sweep(gallery.group(item)); },
  turn: (by) => gallery.turn(by),
  sweeps: () => Boolean(form.facts?.handoff),
  enlarge: (item, url) => { $('large-picture').src = url; $('large-picture').alt = item.settings.prompt; $('large-picture').className = item.width < 300 ? 'small' : ''; $('large').showModal(); },
  retry: (job) => retry(job),
  resize: (size) => { form.write({ ...form.read(), size }); submit(); },
  example: (text) => { form.write({ ...form.read(), prompt: text }); $('prompt').focus(); },
});

// ------------------------------------------------------------------ drawing

/** Draw pictures with `wanted` settings, side by side if there are several. */
async function draw(wanted, start, group = '') {
  if (running.length) return;
  form.clearWrong();
  const splits = await Promise.all(wanted.map((settings) => form.split(settings, Boolean(start))));
  if (running.length) return;
  const now = new Date().toISOString();
  const jobs = wanted.map((settings, number) => new Job({
    settings, start, split: splits[number], group, id: `${now}-${wanted.length - number}`, changed: news,
  }));
  running = jobs;
  busy(true);
  watch();
  if (matchMedia('(max-width: 60rem)').matches) $('stage').scrollIntoView({ block: 'start' });
  say('Drawing');
  await Promise.all(jobs.map((job) => job.run(form.body(job.settings, start)).then(finished)));
  running = [];
  busy(false);
  ended(jobs);
}

function news(job) {
  if (running.includes(job)) stage.update(job);
}

async function finished(job) {
  if (job.state === 'done') await gallery.add(job.item);
}

function watch() {
  if (!running.length) return;
  watching = true;
  $('watch').hidden = true;
  gallery.mark(null);
  stage.drawing(running);
}

function ended(jobs) {
  const [job] = jobs;
  const drawn = jobs.filter((each) => each.state === 'done');
  if (drawn.length) say(`${plural(drawn.length, 'picture')} drawn`);
  if (!watching && drawn.length === jobs.length) {
    toast('Drawn', { text: 'Show', run: () => show(job.item) });
  } else if (jobs.length > 1) {
    if (drawn.length === jobs.length) stage.sweep(jobs.map((each) => each.item));
    else if (jobs.every((each) => each.state === 'cancelled')) show(gallery.items[0] ?? null);
  } else if (job.state === 'done') {
    show(job.item);
  } else if (job.state === 'cancelled') {
    say('Cancelled');
    show(gallery.items[0] ?? null);
    toast('Cancelled');
  } else {
    if (!watching) stage.drawing(jobs);
    refused(job);
  }
}

function refused(job) {
  if (job.error.status === 401) askKey(() => retry(job), job.error);
  else if (job.error.param) form.refuse(job.error.param, job.error.message);
}

function retry(job) {
  if (job.error?.status === 401) askKey(() => draw([job.settings], job.start));
  else draw([job.settings], job.start, job.group);
}

function cancel() {
  for (const job of running) job.cancel();
}

function busy(is) {
  $('draw').disabled = is;
  $('cancel').hidden = !is;
  $('watch').hidden = true;
  document.body.classList.toggle('busy', is);
}

/** Draw `item` with other handoffs, those that take other numbers of steps, and without the refiner. */
async function sweep(item) {
  const found = new Map();
  for (const handoff of SWEPT) {
    const settings = { ...item.settings, handoff };
    const split = await form.split(settings, false);
    if (split?.[0] && split[1] && found.size < MOST_SWEPT && !found.has(split[0])) found.set(split[0], settings);
  }
  const wanted = [...found.values()].reverse();
  const score = item.settings.score ?? form.facts.score?.usual ?? null;
  draw([...wanted.map((settings) => ({ ...settings, score })), { ...item.settings, handoff: null }], null, `sweep-${Date.now()}`);
}

function submit() {
  if (!form.facts) return;
  const settings = form.read();
  form.clearWrong();
  for (const id of ['steps', 'width', 'height', 'guidance']) {
    const name = { width: 'size', height: 'size', guidance: 'guidance_scale' }[id] ?? id;
    if ($(id).value === '') { form.refuse(name, 'Give a number.'); return; }
  }
  if (settings.seed && !/^\d{1,20}$/.test(settings.seed)) {
    form.refuse('seed', `Give a whole number from 0 to ${form.facts.seed.high}, or nothing for a new one each time.`);
  } else if (!settings.prompt.trim()) {
    form.refuse('prompt', 'Say what the picture shows: a few words are enough.');
  } else {
    draw([settings], form.start);
  }
}

// ------------------------------------------------------------------ showing

function show(item) {
  if (running.length) {
    if (!item) return;
    watching = false;
    $('watch').hidden = false;
  }
  gallery.mark(item);
  if (!item) { stage.empty(form.facts); return; }
  stage.picture(item, { number: gallery.items.indexOf(item) + 1, count: gallery.items.length, swept: gallery.group(item).length });
}

function use(item) {
  form.write({ ...form.read(), ...item.settings });
  form.startFrom(item.start);
  $('prompt').focus();
  toast('Its settings are in the form');
}

// ------------------------------------------------------------------ keys, files, theme

document.addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    submit();
  } else if (event.key === 'Escape' && running.length && !document.querySelector('dialog[open]')) {
    cancel();
  } else if ((event.key === 'ArrowLeft' || event.key === 'ArrowRight') && !event.altKey && !event.ctrlKey && !event.metaKey
    && !event.target.closest?.('input, textarea, select, pre, dialog')) {
    event.preventDefault();
    gallery.turn(event.key === 'ArrowLeft' ? -1 : 1);
  }
});

$('form').addEventListener('submit', (event) => { event.preventDefault(); submit(); });
$('cancel').addEventListener('click', cancel);
$('watch').addEventListener('click', watch);
$('keys').addEventListener('click', () => $('keys-dialog').showModal());
$('large-close').addEventListener('click', () => $('large').close());
$('large').addEventListener('click', (event) => { if (event.target !== $('large-close')) $('large').close(); });
$('clear').addEventListener('click', () => {
  $('ask-says').textContent = `${plural(gallery.items.length, 'picture')} will be gone from this browser for good.`;
  $('ask-dialog').returnValue = 'no';
  $('ask-dialog').showModal();
});
$('ask-dialog').addEventListener('close', () => { if ($('ask-dialog').returnValue === 'yes') gallery.clear(); });

const pictured = (transfer) => [...(transfer?.files ?? [])].find((file) => file.type.startsWith('image/'));
let inside = 0;
addEventListener('dragenter', (event) => {
  if (![...event.dataTransfer.types].includes('Files')) return;
  inside += 1;
  $('veil').hidden = false;
});
addEventListener('dragleave', () => { inside = Math.max(inside - 1, 0); $('veil').hidden = inside === 0; });
addEventListener('dragover', (event) => event.preventDefault());
addEventListener('drop', (event) => {
  event.preventDefault();
  inside = 0;
  $('veil').hidden = true;
  if (form.facts && pictured(event.dataTransfer)) form.startFrom(pictured(event.dataTransfer));
});
addEventListener('paste', (event) => {
  // Text that was copied with its picture is text where text is written.
  const writes = event.target.closest?.('textarea, input') && event.clipboardData.types.includes('text/plain');
  if (!form.facts || writes || !pictured(event.clipboardData)) return;
  event.preventDefault();
  form.startFrom(pictured(event.clipboardData));
});

const dark = matchMedia('(prefers-color-scheme: dark)');
const theme = () => document.documentElement.dataset.theme ?? (dark.matches ? 'dark' : 'light');

function wear(name) {
  if (name) document.documentElement.dataset.theme = name;
  const other = theme() === 'dark' ? 'light' : 'dark';
  $('theme').setAttribute('aria-label', `Switch to ${other}`);
  $('theme').title = `Switch to ${other}`;
}

dark.addEventListener('change', () => wear());
$('theme').addEventListener('click', () => {
  const name = theme() === 'dark' ? 'light' : 'dark';
  wear(name);
  try { localStorage.setItem(THEME, name); } catch { /* a browser that keeps nothing */ }
});
try { wear(localStorage.getItem(THEME)); } catch { wear(); }

let after = () => {};

/** Ask for the key, then go on with `then`. */
function askKey(then, error = null) {
  after = then;
  if (error && $('key').dataset.tried) $('key-says').textContent = 'The server did not take this key. Look for a letter too many or too few.';
  if (!$('key-dialog').open) $('key-dialog').showModal();
  $('key').select();
}

$('key-form').addEventListener('submit', () => {
  setKey($('key').value.trim());
  $('key').dataset.tried = 'true';
  after();
});
$('key-cancel').addEventListener('click', () => $('key-dialog').close());

// ------------------------------------------------------------------ the start

async function begin() {
  try {
    const facts = await getJSON('/page/facts');
    form.offer(facts);
    $('key').value = '';
    const { base, refiner } = facts.models;
    $('models').textContent = facts.embedded ? 'the embedded pair' : [base, refiner].filter(Boolean).join(' + ');
    $('models').hidden = false;
    $('main').classList.remove('waits');
    $('draw').disabled = running.length > 0;
    if (!gallery.items.length) stage.empty(facts);
    else show(gallery.items[0]);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (error.status === 401) askKey(begin, error);
    lost(error);
  }
}

/** Say that the server does not answer, and ask again. */
function lost(error) {
  const again = el('button', { type: 'button', className: 'primary', onclick: begin }, el('span', { textContent: error.status === 401 ? 'Enter a key' : 'Try again' }));
  $('stage').className = 'stage empty';
  $('stage').replaceChildren(el('div', { className: 'intro failed', role: 'alert' }, icon('warn'),
    el('h2', { textContent: error.status === 401 ? 'The server wants a key' : 'The server does not answer' }),
    el('p', { textContent: error.message }), again));
}

if (innerWidth > 960) $('fine').open = true;
await Promise.all([gallery.open(), begin()]);
if (form.facts && !running.length) show(gallery.items[0] ?? null);
