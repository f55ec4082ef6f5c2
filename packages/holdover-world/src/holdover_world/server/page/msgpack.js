"use strict";
// The part of msgpack (https://msgpack.org) that the stream uses. A package from npm would add a build step or 22 kB of
// minified code.

const msgpack = {
  /** Encode an object of strings, numbers and arrays of numbers. */
  encode(value) {
    const bytes = [];
    const put = (item) => {
      if (Array.isArray(item)) {
        bytes.push(0x90 | item.length);
        item.forEach(put);
      } else if (typeof item === "string") {
        const text = new TextEncoder().encode(item);
        bytes.push(0xd9, text.length, ...text);
      } else if (typeof item === "number" && Number.isInteger(item) && item >= 0 && item < 2 ** 32 && !Object.is(item, -0)) {
        bytes.push(0xce, item >>> 24, (item >>> 16) & 255, (item >>> 8) & 255, item & 255);
      } else if (typeof item === "number") {
        throw new TypeError("wrap numbers that are not whole in msgpack.float");
      } else if (item instanceof DataView) {
        bytes.push(0xcb, ...new Uint8Array(item.buffer));
      } else {
        const keys = Object.keys(item);
        bytes.push(0x80 | keys.length);
        keys.forEach((key) => { put(key); put(item[key]); });
      }
    };
    put(value);
    return new Uint8Array(bytes);
  },

  /** A number that is encoded as a 64-bit float, also if it is whole. */
  float(number) {
    const view = new DataView(new ArrayBuffer(8));
    view.setFloat64(0, number);
    return view;
  },

  decode(buffer) {
    const view = new DataView(buffer);
    let at = 0;
    const unsigned = (size) => {
      const value = size === 1 ? view.getUint8(at) : size === 2 ? view.getUint16(at)
        : size === 4 ? view.getUint32(at) : Number(view.getBigUint64(at));
      at += size;
      return value;
    };
    const binary = (size) => { at += size; return new Uint8Array(buffer, at - size, size); };
    const text = (size) => new TextDecoder().decode(binary(size));
    const list = (size) => Array.from({ length: size }, take);
    const map = (size) => Object.fromEntries(Array.from({ length: size }, () => [take(), take()]));
    function take() {
      const code = unsigned(1);
      if (code < 0x80) return code;
      if (code < 0x90) return map(code & 15);
      if (code < 0xa0) return list(code & 15);
      if (code < 0xc0) return text(code & 31);
      if (code >= 0xe0) return code - 256;
      switch (code) {
        case 0xc0: return null;
        case 0xc2: return false;
        case 0xc3: return true;
        case 0xc4: return binary(unsigned(1));
        case 0xc5: return binary(unsigned(2));
        case 0xc6: return binary(unsigned(4));
        case 0xcb: at += 8; return view.getFloat64(at - 8);
        case 0xcc: case 0xcd: case 0xce: case 0xcf: return unsigned(2 ** (code - 0xcc));
        case 0xd9: return text(unsigned(1));
        case 0xda: return text(unsigned(2));
        case 0xdc: return list(unsigned(2));
        case 0xde: return map(unsigned(2));
        default: throw new RangeError(`msgpack code ${code}`);
      }
    }
    return take();
  },
};
