// What is being drawn: each job follows one request from the queue to its picture.

import { draw } from './api.js';
import { seedOf, textsOf } from './record.js';

/** The stages of a picture, in order. */
export const STAGES = ['queue', 'prompt', 'base', 'swap', 'refiner', 'decode'];
const THUMB = 320;

export class Job {
  stage = 'send';
  state = 'running';
  waiting = null;
  done = { base: 0, refiner: 0 };
  of = { base: 0, refiner: 0 };
  preview = '';
  error = null;
  item = null;
  #stop = new AbortController();
  #began = 0;
  #stepped = 0;

  /** `settings` as the form reads them; `split` is [base, refiner] or null; `changed(job)` is called at all news. */
  constructor({ settings, start, split, group, id, changed }) {
    Object.assign(this, { settings, start, group, id, changed });
    if (split) [this.of.base, this.of.refiner] = split;
  }

  cancel() {
    if (this.state === 'running') this.#stop.abort();
  }

  /** Return the seconds that are left, as far as the steps tell; null before the second one. */
  get left() {
    const { base, refiner } = this.done;
    const taken = base + refiner;
    if (taken < 2) return null;
    const each = (this.#stepped - this.#began) / 1000 / (taken - 1);
    return each * (this.of.base + this.of.refiner - taken);
  }

  async run(body) {
    const asked = performance.now();
    try {
      const done = await draw(body, {
        seed: this.settings.seed, start: this.start, signal: this.#stop.signal,
        on: {
          waiting: (told) => this.#news({ waiting: told, stage: 'queue' }),
          step: (told) => this.#step(told),
          preview: (blob) => this.#preview(blob),
        },
      });
      this.item = await this.#item(done, (performance.now() - asked) / 1000);
      this.#news({ state: 'done' });
    } catch (error) {
      const stopped = error.name === 'AbortError';
      this.#news({ state: stopped ? 'cancelled' : 'failed', error: stopped ? null : error });
    }
    URL.revokeObjectURL(this.preview);
    return this;
  }

  #news(news) {
    Object.assign(this, news);
    this.changed(this);
  }

  #step({ stage, index, total }) {
    const now = performance.now();
    if (stage === 'base' || stage === 'refiner') {
      this.#began ||= now;
      this.#stepped = now;
      this.done[stage] = index;
      this.of[stage] = total;
      const last = this.of.refiner ? this.done.refiner === this.of.refiner : this.done.base === this.of.base;
      this.#news({ stage: last ? 'decode' : stage });
    } else if (stage === 'load') {
      this.#news({ stage: this.done.base && !this.done.refiner && this.of.refiner ? 'swap' : this.#began ? this.stage : 'load' });
    } else {
      this.#news({ stage: stage === 'decode' ? 'decode' : 'prompt' });
    }
  }

  #preview(blob) {
    URL.revokeObjectURL(this.preview);
    this.#news({ preview: URL.createObjectURL(blob) });
  }

  async #item(done, seconds) {
    const [texts, thumb] = await Promise.all([textsOf(done.blob), thumbnail(done.blob)]);
    const seed = seedOf(texts, done.seed);
    return {
      id: this.id, blob: done.blob, thumb: thumb.blob, width: thumb.width,
      height: thumb.height, settings: { ...this.settings, seed }, seed, texts, seconds, group: this.group ?? '',
      split: [this.of.base, this.of.refiner], start: this.start ?? null,
      warnings: done.warnings ?? [],
    };
  }
}

/** Return a small copy of a picture, and the size of the picture itself. */
async function thumbnail(blob) {
  const bitmap = await createImageBitmap(blob);
  const { width, height } = bitmap;
  const scale = Math.min(1, THUMB / Math.max(width, height));
  if (scale === 1) {
    bitmap.close();
    return { blob, width, height };
  }
  const canvas = document.createElement('canvas');
  [canvas.width, canvas.height] = [Math.round(width * scale), Math.round(height * scale)];
  canvas.getContext('2d').drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  const small = await new Promise((resolve) => { canvas.toBlob(resolve, 'image/webp', 0.85); });
  return { blob: small ?? blob, width, height };
}
