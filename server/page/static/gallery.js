// The gallery: the pictures that were drawn on this device, in rows of thumbnails that arrow keys walk.

import { $, el, plural, toast } from './dom.js';
import * as store from './store.js';

export class Gallery {
  items = [];
  chosen = null;
  #here = $('pictures');
  #cells = new Map();
  #select;

  /** `select(item)` is called when somebody chooses a picture, with null when there are none. */
  constructor(select) {
    this.#select = select;
    this.#here.addEventListener('keydown', (event) => this.#key(event));
  }

  async open() {
    this.#here.replaceChildren(...Array.from({ length: 6 }, () => el('i', { className: 'ghost' })));
    this.items = await store.all();
    this.#here.replaceChildren(...this.items.map((item) => this.#cell(item)));
    await this.#count();
  }

  #cell(item) {
    const url = URL.createObjectURL(item.thumb);
    const cell = el('button', {
      type: 'button', onclick: () => this.#select(item), tabIndex: -1, title: item.settings.prompt,
      className: item.width < 300 ? 'small' : '',
    }, el('img', { src: url, alt: item.settings.prompt, loading: 'lazy', decoding: 'async' }));
    if (item.group) cell.append(el('span', { className: 'mark', textContent: item.settings.handoff === null ? 'base' : `${Math.round(item.settings.handoff * 100)} %` }));
    this.#cells.set(item.id, { cell, url });
    return cell;
  }

  /** Add a new picture, and let go of the oldest if there are too many. */
  async add(item) {
    this.#insert(item);
    await store.put(item).catch(() => toast('This browser keeps no more pictures: download what you need.'));
    for (const old of store.tooMany(this.items)) await this.#drop(old);
    await this.#count();
  }

  async remove(item) {
    const at = this.items.indexOf(item);
    const focused = this.#here.contains(document.activeElement);
    await this.#drop(item);
    await this.#count();
    toast('Deleted', { text: 'Undo', run: () => this.#restore(item) });
    const next = this.items[Math.min(at, this.items.length - 1)] ?? null;
    this.#select(next);
    if (focused && next) this.#cells.get(next.id).cell.focus();
  }

  /** Put a picture in its place: the newest first, those of a sweep in order. */
  #insert(item) {
    const at = this.items.findIndex((each) => each.id < item.id);
    const before = at < 0 ? null : this.#cells.get(this.items[at].id).cell;
    this.items.splice(at < 0 ? this.items.length : at, 0, item);
    this.#here.insertBefore(this.#cell(item), before);
  }

  async #restore(item) {
    this.#insert(item);
    await store.put(item);
    await this.#count();
    this.#select(item);
  }

  async #drop(item) {
    const { cell, url } = this.#cells.get(item.id);
    cell.remove();
    URL.revokeObjectURL(url);
    this.#cells.delete(item.id);
    this.items.splice(this.items.indexOf(item), 1);
    await store.remove(item.id);
  }

  async clear() {
    for (const { url } of this.#cells.values()) URL.revokeObjectURL(url);
    this.#cells.clear();
    this.items = [];
    this.#here.replaceChildren();
    await store.clear();
    await this.#count();
    this.#select(null);
  }

  async #count() {
    const count = this.items.length;
    $('clear').hidden = count === 0;
    const where = await store.isKept() ? `kept in this browser, ${store.MOST} at most` : 'until this page is closed: the browser keeps nothing';
    $('kept').textContent = count ? `${plural(count, 'picture')}, ${where}` : 'Pictures stay here when the page is loaded again.';
    if (!this.#here.querySelector('[tabindex="0"]') && this.items[0]) this.#cells.get(this.items[0].id).cell.tabIndex = 0;
  }

  /** Mark the picture that is on the stage; null marks none. */
  mark(item) {
    for (const [id, { cell }] of this.#cells) {
      const here = id === item?.id;
      cell.tabIndex = here || (!item && id === this.items[0]?.id) ? 0 : -1;
      if (here) cell.setAttribute('aria-current', 'true');
      else cell.removeAttribute('aria-current');
    }
    this.chosen = item;
  }

  group(item) {
    return item.group ? this.items.filter((each) => each.group === item.group).sort((a, b) => (a.settings.handoff ?? 2) - (b.settings.handoff ?? 2)) : [item];
  }

  /** Choose the picture `by` places on; a focus in the gallery goes with it. */
  turn(by) {
    if (!this.items.length) return;
    const at = this.chosen ? this.items.indexOf(this.chosen) + by : 0;
    const next = this.items[Math.min(Math.max(at, 0), this.items.length - 1)];
    const focused = this.#here.contains(document.activeElement);
    this.#select(next);
    if (focused) this.#cells.get(next.id).cell.focus();
  }

  #key(event) {
    if (event.key === 'Delete' && this.chosen) this.remove(this.chosen);
    else if (event.key === 'Home') this.turn(-this.items.length);
    else if (event.key === 'End') this.turn(this.items.length);
    else return;
    event.preventDefault();
  }
}
