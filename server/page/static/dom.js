// Small helpers for the document. Every text is set as text: nothing that the server says is read as markup.

export const $ = (id) => document.getElementById(id);

/** Make an element; `props` are properties, `data-…` and `aria-…` attributes, and `on…` listeners. */
export function el(tag, props = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null) continue;
    if (name.startsWith('on')) made.addEventListener(name.slice(2), value);
    else if (name.includes('-') || name === 'role' || name === 'for') made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Make an icon of the page's own sprite. */
export function icon(name) {
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
  const use = document.createElementNS('http://www.w3.org/2000/svg', 'use');
  use.setAttribute('href', `#i-${name}`);
  svg.setAttribute('class', 'icon');
  svg.setAttribute('aria-hidden', 'true');
  svg.append(use);
  return svg;
}

export function button(name, text, onclick, props = {}) {
  return el('button', { type: 'button', onclick, ...props }, icon(name), el('span', { textContent: text }));
}

/** Tell a screen reader, once. */
export function say(text) {
  $('said').textContent = text;
}

let hiding = 0;

/** Show a short note at the bottom, with something to do about it. */
export function toast(text, action = null) {
  const shown = $('toast');
  clearTimeout(hiding);
  shown.replaceChildren(el('span', { textContent: text }));
  if (action) {
    const act = () => { shown.hidden = true; action.run(); };
    shown.append(el('button', { type: 'button', textContent: action.text, onclick: act }));
  }
  shown.hidden = false;
  hiding = setTimeout(() => { shown.hidden = true; }, action ? 8000 : 4000);
}

export async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without https, browsers give no clipboard: select it the old way.
    const area = el('textarea', { value: text, className: 'off' });
    document.body.append(area);
    area.select();
    document.execCommand('copy');
    area.remove();
  }
  toast(`${what} copied`);
}

export function seconds(value) {
  if (value < 10) return `${value.toFixed(1)} s`;
  return value < 100 ? `${Math.round(value)} s` : `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}

export const plural = (count, one, many = `${one}s`) => `${count} ${count === 1 ? one : many}`;
