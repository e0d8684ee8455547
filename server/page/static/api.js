// The server: what it offers, and pictures drawn with their previews. The key stays in this variable alone.

let key = '';

export function setKey(text) {
  key = text;
}

/** A request that the server refused, or that it did not answer (status 0). */
export class Refused extends Error {
  constructor(status, error = {}, retryAfter = 0) {
    super(error.message || 'The server does not answer.');
    Object.assign(this, { status, code: error.code || '', param: error.param || '', retryAfter });
  }
}

async function ask(path, options = {}) {
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    throw error.name === 'AbortError' ? error : new Refused(0);
  }
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => ({}));
  throw new Refused(answer.status, body.error, Number(answer.headers.get('Retry-After')) || 0);
}

export async function getJSON(path, signal) {
  return (await ask(path, { signal })).json();
}

/** Return the request for `body`; the seed is text, since JSON in a browser rounds large numbers. */
function request(body, seed, start) {
  if (!start) {
    const text = JSON.stringify(body);
    const whole = seed ? `{"seed":${seed},${text.slice(1)}` : text;
    return ['/v1/images/generations', { body: whole, headers: { 'Content-Type': 'application/json' } }];
  }
  const form = new FormData();
  for (const [name, value] of Object.entries(seed ? { ...body, seed } : body)) {
    form.append(name, typeof value === 'object' && value !== null ? JSON.stringify(value) : String(value));
  }
  form.append('image', start, 'picture');
  return ['/v1/images/edits', { body: form }];
}

/**
 * Draw one picture. `on` has waiting({place, seconds}), step({stage, index, total}) and preview(blob, {stage, step});
 * returns {blob, seed, size, warnings}. Throws Refused, or an AbortError if `signal` was aborted.
 */
export async function draw(body, { seed, start, signal, on }) {
  const [path, options] = request({ ...body, stream: true }, seed, start);
  const answer = await ask(path, { method: 'POST', signal, ...options });
  let done = null;
  try {
    for await (const event of events(answer.body)) {
      if (event.comment) heard(event.comment, on);
      else if (event.data.error) throw new Refused(200, event.data.error);
      else if (event.data.type.endsWith('partial_image')) on.preview(asBlob(event.data), event.data);
      else if (event.data.type.endsWith('completed')) done = { ...event.data, blob: asBlob(event.data) };
    }
  } catch (error) {
    throw error instanceof Refused || error.name === 'AbortError' ? error : new Refused(0);
  }
  if (!done) throw new Refused(0);
  return done;
}

function heard(comment, on) {
  const [kind, rest] = [comment.split(' ', 1)[0], comment.slice(comment.indexOf(' '))];
  if (kind === 'waiting' || kind === 'step') on[kind](JSON.parse(rest));
}

/** Yield {data} of each event of a stream, and {comment} of each comment. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let parts = [];
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const pieces = value.split('\n');
    parts.push(pieces[0]);
    for (const piece of pieces.slice(1)) {
      const line = parts.join('');
      parts = [piece];
      if (line.startsWith('data: ')) yield { data: JSON.parse(line.slice(6)) };
      else if (line.startsWith(': ')) yield { comment: line.slice(2) };
    }
  }
}

function asBlob({ b64_json: text, output_format: format }) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i += 1) bytes[i] = raw.charCodeAt(i);
  return new Blob([bytes], { type: `image/${format}` });
}
