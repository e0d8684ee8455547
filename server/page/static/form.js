// The form: what is asked for, kept from visit to visit, and the handoff with the steps of each expert.

import { $, el } from './dom.js';
import { getJSON } from './api.js';

const KEPT = 'trt-serve.form';
const FIELDS = {
  prompt: 'prompt', negative_prompt: 'negative', size: 'width', steps: 'steps', num_inference_steps: 'steps', seed: 'seed',
  handoff: 'handoff', guidance_scale: 'guidance', aesthetic_score: 'score', sampler: 'sampler', scheduler: 'scheduler',
  strength: 'strength', image: 'file', loras: 'loras',
};
const MOST_CELLS = 60;

export class Form {
  #facts = null;
  #asking = null;
  #steps = null;
  #settled = Promise.resolve();
  #start = null;
  #changed;

  constructor(changed) {
    this.#changed = changed;
    $('form').addEventListener('input', (event) => this.#input(event));
    $('new-seed').addEventListener('click', () => { $('seed').value = ''; this.#input({ target: $('seed') }); });
    $('file').addEventListener('change', () => { if ($('file').files[0]) this.startFrom($('file').files[0]); });
    $('start-remove').addEventListener('click', () => { this.startFrom(null); $('file').focus(); });
    for (const area of [$('prompt'), $('negative')]) area.addEventListener('input', () => fit(area));
  }

  /** Offer what the server has. */
  offer(facts) {
    this.#facts = facts;
    const { sizes, steps, handoff, score, guidance } = facts;
    $('shapes').replaceChildren(...sizes.choices.map((size) => shape(size)));
    for (const side of [$('width'), $('height')]) side.step = sizes.multiple;
    [$('height').min, $('width').min] = sizes.low;
    [$('height').max, $('width').max] = sizes.high;
    $('multiple').textContent = `multiples of ${sizes.multiple}`;
    Object.assign($('steps'), { min: steps.low, max: steps.high });
    Object.assign($('steps-slider'), { min: steps.low, max: Math.min(steps.high, steps.usual * 3) });
    $('handoff-card').hidden = !handoff;
    if (handoff) Object.assign($('handoff'), { min: handoff.low, max: handoff.high });
    $('score-field').hidden = !score;
    if (score) Object.assign($('score'), { min: score.low, max: score.high });
    Object.assign($('guidance'), { min: guidance.low, max: guidance.high });
    choices($('sampler'), facts.samplers.choices, `${facts.samplers.usual}, the model's own`);
    choices($('scheduler'), facts.schedules.choices, "the model's own");
    $('loras-field').hidden = facts.loras.length === 0;
    $('loras').replaceChildren(...facts.loras.map(lora));
    this.write({ ...this.#usual(), ...kept() });
  }

  #usual() {
    const { sizes, steps, handoff, score, guidance, strength } = this.#facts;
    return { prompt: '', negative: '', size: sizes.usual, steps: steps.usual, seed: '', handoff: handoff?.usual ?? null,
      place: handoff?.usual, guidance: guidance.usual, score: score?.usual ?? null, sampler: '', scheduler: '', loras: [],
      strength: strength.usual };
  }

  /** Return what is asked for. `handoff` null is the base alone; `place` is where the slider stands even so. */
  read() {
    const refined = this.#facts.handoff && $('refined').checked;
    return {
      prompt: $('prompt').value, negative: $('negative').value, size: `${$('width').value}x${$('height').value}`,
      steps: number('steps'), seed: $('seed').value.trim(), handoff: refined ? number('handoff') : null,
      place: number('handoff'), guidance: number('guidance'), score: number('score'), sampler: $('sampler').value,
      scheduler: $('scheduler').value, strength: number('strength'), loras: readLoras(),
    };
  }

  /** Show settings, those that the server has no more as they usually are. */
  write(settings) {
    const all = { ...this.#usual(), ...settings };
    const [width, height] = all.size.split('x');
    const values = { prompt: all.prompt, negative: all.negative, width, height, steps: all.steps, 'steps-slider': all.steps,
      seed: all.seed, guidance: all.guidance, score: all.score, sampler: all.sampler, scheduler: all.scheduler,
      strength: all.strength };
    for (const [id, value] of Object.entries(values)) $(id).value = value ?? '';
    for (const menu of [$('sampler'), $('scheduler')]) if (menu.selectedIndex < 0) menu.value = '';
    if (this.#facts.handoff) $('handoff').value = all.handoff ?? all.place ?? this.#facts.handoff.usual;
    $('refined').checked = all.handoff !== null;
    writeLoras(all.loras);
    for (const area of [$('prompt'), $('negative')]) fit(area);
    this.clearWrong();
    this.#show();
    this.#keep();
  }

  /** Return the body of a request for `settings`, without its seed. */
  body(settings, start) {
    const { handoff, score } = this.#facts;
    const body = { prompt: settings.prompt, size: settings.size, steps: settings.steps, guidance_scale: settings.guidance };
    if (settings.negative) body.negative_prompt = settings.negative;
    if (handoff) body.handoff = settings.handoff;
    if (score && settings.handoff !== null) body.aesthetic_score = settings.score;
    if (settings.sampler) body.sampler = settings.sampler;
    if (settings.scheduler) body.scheduler = settings.scheduler;
    if (settings.loras.length) body.loras = settings.loras;
    if (start) body.strength = settings.strength;
    return { ...body, partial_images: this.#facts.partials };
  }

  get facts() { return this.#facts; }

  get start() { return this.#start; }

  async startFrom(blob) {
    this.#wrong('image', '');
    if (blob && blob.size > this.#facts.upload.bytes) {
      const most = Math.floor(this.#facts.upload.bytes / 2 ** 20);
      this.#wrong('image', `The file has ${(blob.size / 2 ** 20).toFixed(0)} MiB; this server takes ${most} MiB.`);
      return;
    }
    let bitmap = null;
    try {
      bitmap = blob && await createImageBitmap(blob);
    } catch {
      this.#wrong('image', 'This is no picture that can be read. Choose a PNG, a JPEG or a WebP.');
      return;
    }
    URL.revokeObjectURL($('start-picture').src);
    this.#start = blob;
    $('file').value = '';
    $('drop-label').hidden = Boolean(blob);
    $('started').hidden = $('strength-field').hidden = !blob;
    if (blob) {
      $('start-picture').src = URL.createObjectURL(blob);
      $('start-size').textContent = `${bitmap.width} × ${bitmap.height} pixels`;
      bitmap.close();
    } else {
      $('start-picture').removeAttribute('src');
    }
    this.#show();
  }

  /** Return [base, refiner] steps for `settings`, from the server's own table; null while it is not known. */
  async split(settings, started) {
    const table = await this.#table(settings, started).catch(() => null);
    return table && cut(table, settings.handoff, this.#facts.handoff);
  }

  #table(settings, started, signal) {
    const query = new URLSearchParams({ steps: settings.steps });
    if (settings.sampler) query.set('sampler', settings.sampler);
    if (settings.scheduler) query.set('scheduler', settings.scheduler);
    if (started) query.set('strength', settings.strength);
    return getJSON(`/page/steps?${query}`, signal);
  }

  #input(event) {
    const { id, type } = event.target;
    if (id === 'steps-slider') $('steps').value = event.target.value;
    if (type === 'radio') [$('width').value, $('height').value] = event.target.value.split('x');
    this.#wrong(Object.keys(FIELDS).find((name) => FIELDS[name] === id) ?? (id === 'height' ? 'size' : ''), '');
    this.#show();
    this.#keep();
  }

  #keep() {
    try {
      localStorage.setItem(KEPT, JSON.stringify(this.read()));
    } catch { /* a browser that keeps nothing */ }
  }

  #show() {
    const settings = this.read();
    $('steps-slider').value = settings.steps;
    $('strength-is').textContent = `${Math.round(settings.strength * 100)} %`;
    $('score-is').textContent = (settings.score ?? 0).toFixed(1);
    for (const each of $('shapes').querySelectorAll('input')) each.checked = each.value === settings.size;
    $('handoff').disabled = !$('refined').checked;
    $('score').disabled = this.#facts.handoff !== null && settings.handoff === null;
    const changed = [settings.sampler, settings.scheduler, settings.loras.length > 0].filter(Boolean).length
      + (settings.guidance !== this.#facts.guidance.usual) + (settings.score !== (this.#facts.score?.usual ?? settings.score));
    $('fine-says').textContent = changed ? `${changed} changed` : 'as usual';
    this.#showSplit();
    this.#settled = this.#refresh(settings);
    this.#changed(settings);
  }

  async #refresh(settings) {
    const asked = JSON.stringify([settings.steps, settings.sampler, settings.scheduler, this.#start && settings.strength]);
    if (asked === this.#asking?.asked) return;
    this.#asking?.stop.abort();
    const stop = new AbortController();
    this.#asking = { asked, stop };
    try {
      this.#steps = await this.#table(settings, Boolean(this.#start), stop.signal);
    } catch (error) {
      if (error.name === 'AbortError') return;
      this.#steps = null;
    }
    if (this.#asking.stop === stop) this.#showSplit();
  }

  #showSplit() {
    const settings = this.read();
    const table = this.#steps;
    const [base, refiner] = table ? cut(table, settings.handoff, this.#facts.handoff) : [1, 0];
    const share = Math.round(settings.place * 100);
    grow('cells-given', table?.first ?? 0);
    grow('cells-base', base);
    grow('cells-refiner', refiner);
    const cells = table && table.total <= MOST_CELLS ? table.total : 1;
    $('cells-lines').style.setProperty('--cells', cells);
    $('count-base').textContent = table ? base : '–';
    $('count-refiner').textContent = table ? refiner : '–';
    $('share').textContent = settings.handoff === null ? '' : `${share} %`;
    $('handoff').setAttribute('aria-valuetext', `${share} %: base ${base}, refiner ${refiner} steps`);
    $('handoff-says').textContent = says(settings, base, refiner, share, table);
    $('draw').style.setProperty('--share', settings.handoff === null ? '100%' : `${share}%`);
  }

  /** Wait until the steps on show are those of the settings. */
  settled() { return this.#settled; }

  clearWrong() {
    for (const each of document.querySelectorAll('.wrong')) each.hidden = true;
    for (const each of document.querySelectorAll('[aria-invalid]')) each.removeAttribute('aria-invalid');
  }

  /** Say what is wrong beside the field of a request; return whether there is one on the page. */
  refuse(param, message) {
    const name = param.split(' ')[0];
    if (!FIELDS[name]) return false;
    this.#wrong(name, message.replace(new RegExp(`^${name}: `), ''));
    const field = $(FIELDS[name]);
    if (field.closest('details')) field.closest('details').open = true;
    field.focus({ preventScroll: true });
    field.closest('.card').scrollIntoView({ block: 'nearest' });
    return true;
  }

  #wrong(param, message) {
    const id = FIELDS[param];
    const said = $(`${id === 'width' ? 'size' : id === 'file' ? 'image' : id}-wrong`);
    if (!said) return;
    said.hidden = !message;
    said.textContent = message;
    for (const field of id === 'width' ? [$('width'), $('height')] : [$(id)]) {
      if (message) field.setAttribute('aria-invalid', 'true');
      else field.removeAttribute('aria-invalid');
      field.setAttribute('aria-errormessage', said.id);
    }
  }
}

/** Return [base, refiner] steps of a table for a handoff; null is the base alone. */
function cut({ total, first, cuts }, handoff, { low, high } = {}) {
  if (handoff === null || handoff === undefined || low === undefined) return [total - first, 0];
  const place = Math.round(((handoff - low) / (high - low)) * (cuts.length - 1));
  const at = Math.max(cuts[Math.min(Math.max(place, 0), cuts.length - 1)], first);
  return [at - first, total - at];
}

function says(settings, base, refiner, share, table) {
  const given = table?.first ? `The picture stands for the first ${table.first} of ${table.total} steps. ` : '';
  if (settings.handoff === null) return `${given}The base draws alone.`;
  if (table && refiner === 0) return `${given}This leaves the refiner no step. Take more steps, or hand over earlier.`;
  if (table && base === 0) return `${given}The refiner alone changes it.`;
  return `${given}The base takes away the first ${share} % of the noise. The refiner, trained for fine detail, takes over the rest.`;
}

function grow(id, share) {
  $(id).style.flexGrow = share;
}

function number(id) {
  return $(id).value === '' ? null : Number($(id).value);
}

function fit(area) {
  area.style.height = 'auto';
  area.style.height = `${area.scrollHeight + 2}px`;
}

function shape(size) {
  const [width, height] = size.split('x').map(Number);
  const box = el('i');
  const scale = 18 / Math.max(width, height);
  box.style.width = `${Math.round(width * scale)}px`;
  box.style.height = `${Math.round(height * scale)}px`;
  const input = el('input', { type: 'radio', name: 'shape', value: size });
  return el('label', { title: `${width} × ${height}` }, input, el('span', {}, box, size.replace('x', ' × ')));
}

function choices(menu, names, usual) {
  menu.replaceChildren(el('option', { value: '', textContent: usual }),
    ...names.map((name) => el('option', { value: name, textContent: name })));
}

function lora(name) {
  const on = el('input', { type: 'checkbox', value: name });
  const scale = el('input', { type: 'number', step: '0.05', value: '1', 'aria-label': `Scale of ${name}` });
  return el('div', { className: 'lora' }, el('label', {}, on, el('span', { textContent: name })), scale);
}

const rows = () => [...$('loras').children].map((row) => row.querySelectorAll('input'));

function readLoras() {
  return rows().filter(([on]) => on.checked).map(([on, scale]) => ({ name: on.value, scale: Number(scale.value) }));
}

function writeLoras(loras) {
  for (const [on, scale] of rows()) {
    const found = loras.find((each) => each.name === on.value);
    on.checked = Boolean(found);
    scale.value = found?.scale ?? 1;
  }
}

function kept() {
  try {
    return JSON.parse(localStorage.getItem(KEPT) ?? '{}');
  } catch {
    return {};
  }
}
