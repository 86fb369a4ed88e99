// Standard normal noise of a seed, the same as edm.generate draws: PyTorch's CPU generator (Mersenne Twister 19937) and
// the Box-Muller transform as torch.randn applies it to tensors of at least 16 numbers.

const N = 624;
const M = 397;
const BLOCK = 16;

export class Draws {
  // seed: a whole number from 0 to 2^32 - 1.
  constructor(seed) {
    this.state = new Uint32Array(N);
    this.state[0] = seed;
    for (let i = 1; i < N; i++) {
      const previous = this.state[i - 1] ^ (this.state[i - 1] >>> 30);
      this.state[i] = Math.imul(1812433253, previous) + i;
    }
    this.next = N;
  }

  // A whole number from 0 to 2^32 - 1.
  uint32() {
    if (this.next === N) this.renew();
    let y = this.state[this.next++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }

  renew() {
    const { state } = this;
    for (let i = 0; i < N; i++) {
      const y = (state[i] & 0x80000000) | (state[(i + 1) % N] & 0x7fffffff);
      state[i] = state[(i + M) % N] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
    this.next = 0;
  }

  // As torch.randint(high, [1]), for high up to 2^25.
  below(high) {
    return this.uint32() % high;
  }

  // As torch.randn([count]).
  normals(count) {
    const uniforms = (n) => Float32Array.from({ length: n }, () => (this.uint32() & 0xffffff) / 2 ** 24);
    const values = uniforms(count);
    for (let start = 0; start + BLOCK <= count; start += BLOCK) makeNormal(values.subarray(start, start + BLOCK));
    if (count % BLOCK) {
      const last = uniforms(BLOCK); // the last 16 numbers are drawn again
      makeNormal(last);
      values.set(last, count - BLOCK);
    }
    return values;
  }
}

// Turns 16 uniform numbers into normal ones, in place.
function makeNormal(values) {
  for (let i = 0; i < BLOCK / 2; i++) {
    const radius = Math.sqrt(-2 * Math.log(1 - values[i]));
    const angle = 2 * Math.PI * values[i + BLOCK / 2];
    values[i] = radius * Math.cos(angle);
    values[i + BLOCK / 2] = radius * Math.sin(angle);
  }
}

// What the network draws for a seed, in the order of edm.generate: noise, a class, then the noise of further steps.
// size: how many numbers a noise has. classes: how many there are to draw from, 0 for none.
export function drawn(seed, size, classes, furtherSteps) {
  const draws = new Draws(seed);
  const z = draws.normals(size);
  const which = classes ? draws.below(classes) : null;
  const further = new Float32Array(furtherSteps * size);
  for (let step = 0; step < furtherSteps; step++) further.set(draws.normals(size), step * size);
  return { z, which, further };
}

// The value of a finite number of 16 bits, 1 of them for the sign and 5 for the exponent, which not all browsers read.
export function fromHalf(bits) {
  const exponent = (bits >> 10) & 31;
  const fraction = (bits & 1023) / 1024;
  const size = exponent ? 2 ** (exponent - 15) * (1 + fraction) : 2 ** -14 * fraction;
  return bits & 0x8000 ? -size : size;
}

// The point at `share` of the way from noise a to noise b along the arc between them, where its length stays typical.
export function between(a, b, share) {
  const product = (x, y) => x.reduce((sum, value, i) => sum + value * y[i], 0);
  const cosine = product(a, b) / Math.sqrt(product(a, a) * product(b, b));
  const angle = Math.acos(Math.min(1, Math.max(-1, cosine)));
  const [from, to] = Math.sin(angle) < 1e-4
    ? [1 - share, share]
    : [Math.sin((1 - share) * angle) / Math.sin(angle), Math.sin(share * angle) / Math.sin(angle)];
  return a.map((value, i) => from * value + to * b[i]);
}
