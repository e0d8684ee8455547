// What a picture's file says of itself: the texts of a PNG, and what they mean for people.

/** Return {keyword: text} of a PNG's tEXt and uncompressed iTXt chunks; {} for other files. */
export async function textsOf(blob) {
  const view = new DataView(await blob.arrayBuffer());
  const found = {};
  if (view.byteLength < 20 || view.getUint32(0) !== 0x89504e47) return found;
  for (let at = 8; at + 12 <= view.byteLength;) {
    const length = view.getUint32(at);
    const kind = ascii(view, at + 4, 4);
    if (at + 12 + length > view.byteLength || kind === 'IDAT') break;
    const bytes = new Uint8Array(view.buffer, at + 8, length);
    if (kind === 'tEXt') {
      const end = bytes.indexOf(0);
      found[latin(bytes.subarray(0, end))] = latin(bytes.subarray(end + 1));
    } else if (kind === 'iTXt') {
      const end = bytes.indexOf(0);
      const language = bytes.indexOf(0, end + 3);
      const text = bytes.subarray(bytes.indexOf(0, language + 1) + 1);
      if (bytes[end + 1] === 0) found[latin(bytes.subarray(0, end))] = new TextDecoder().decode(text);
    }
    at += 12 + length;
  }
  return found;
}

const ascii = (view, at, count) => String.fromCharCode(...new Uint8Array(view.buffer, at, count));
const latin = (bytes) => new TextDecoder('latin1').decode(bytes);

/** Return the record of a picture: the settings that draw it again, as the server wrote them; {} without one. */
export function recordOf(texts) {
  try {
    return JSON.parse(texts['sdxl-trt'] ?? '{}');
  } catch {
    return {};
  }
}

/** Return the seed as text: a browser would round one above 2^53. */
export function seedOf(texts, told) {
  return /"seed": (\d+)/.exec(texts['sdxl-trt'] ?? '')?.[1] ?? String(told ?? '');
}

/** Return the record as people read it. */
export function readable(texts) {
  // The text itself, with a line for each setting: a browser's numbers would not be the server's.
  const lines = [texts.parameters, texts['sdxl-trt']?.replaceAll(', "', ',\n "')];
  return lines.filter(Boolean).join('\n\n') || 'The file holds no record.';
}
