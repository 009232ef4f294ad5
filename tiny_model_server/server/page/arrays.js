// Arrays with a dtype as the server writes them in JSON, {"$array": {"dtype", "shape", "data"}}; images made of them.

const BYTES = {
  bool: [Uint8Array],
  uint8: [Uint8Array],
  uint16: [Uint16Array],
  uint32: [Uint32Array],
  uint64: [BigUint64Array, BigInt],
  int8: [Int8Array],
  int16: [Int16Array],
  int32: [Int32Array],
  int64: [BigInt64Array, BigInt],
  float32: [Float32Array],
  float64: [Float64Array],
};

const MOST = 1_000_000;
const MOST_PIXELS = 1 << 24;

export const isArray = value =>
  Boolean(value?.$array && typeof value.$array === "object" && Object.keys(value).length === 1);

export function shapeOf(data) {
  return Array.isArray(data) ? [data.length, ...(data.length ? shapeOf(data[0]) : [])] : [];
}

export const shape = array => array.$array.shape ?? shapeOf(array.$array.data);

const sizeOf = array => shape(array).reduce((product, size) => product * size, 1);

/** The elements in C order; zeros if there are none. An Error if they are too many for the JSON of a request. */
export function elements(array) {
  const { data } = array.$array;
  const count = sizeOf(array);
  if (count > MOST) throw new Error(`an array of ${count} elements is too large for JSON`);
  return data === undefined ? new Array(count).fill(0) : [data].flat(Infinity);
}

/** The value with the data of every array in it, as the server wants it. */
export const complete = value =>
  convert(value, array =>
    array.$array.data !== undefined
      ? array
      : { $array: { ...array.$array, shape: shape(array), data: elements(array) } },
  );

/** The value without the data of arrays of zeros, for reading. */
export const compact = value =>
  convert(value, array =>
    array.$array.data === undefined || elements(array).some(Boolean)
      ? array
      : { $array: { dtype: array.$array.dtype, shape: shape(array) } },
  );

function convert(value, change) {
  if (isArray(value)) return change(value);
  if (Array.isArray(value)) return value.map(item => convert(item, change));
  if (!value || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, convert(item, change)]));
}

/** The bytes of an array, little-endian, in base64. */
export function base64(array) {
  const [kind, number = Number] = BYTES[array.$array.dtype] ?? [];
  if (!kind) throw new Error(`no bytes for an array of ${array.$array.dtype}`);
  const bytes = new Uint8Array(kind.from(elements(array), number).buffer);
  return btoa(Array.from(bytes, byte => String.fromCharCode(byte)).join(""));
}

/** Whether an array is an image: HxW or HxWx3 of uint8. */
export function isImage(value) {
  if (!isArray(value) || value.$array.dtype !== "uint8") return false;
  return isImageShape(shape(value));
}

export const isImageShape = sizes => sizes.length === 2 || (sizes.length === 3 && [1, 3].includes(sizes[2]));

/** A PNG file of an image; null if it is empty or too large. */
export async function png(array, name) {
  const [height, width, channels = 1] = shape(array);
  const canvas = document.createElement("canvas");
  if (!sizeOf(array) || width * height > MOST_PIXELS) return null;
  [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d");
  context.fillRect(0, 0, width, height);
  if (array.$array.data !== undefined) paint(context, elements(array), width, height, channels);
  return new Promise(resolve =>
    canvas.toBlob(blob => resolve(blob && new File([blob], name, { type: "image/png" })), "image/png"),
  );
}

function paint(context, values, width, height, channels) {
  const pixels = context.createImageData(width, height);
  for (let at = 0; at < width * height; at++) {
    for (let channel = 0; channel < 3; channel++)
      pixels.data[4 * at + channel] = values[at * channels + (channels === 1 ? 0 : channel)];
    pixels.data[4 * at + 3] = 255;
  }
  context.putImageData(pixels, 0, 0);
}
