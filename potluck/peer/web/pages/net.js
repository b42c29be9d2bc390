// The JSON API, and live events.

export class Refusal extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

async function answer(response) {
  const body = await response.json().catch(() => ({}));
  if (response.ok) return body;
  throw new Refusal(response.status, typeof body.detail === "string" ? body.detail : `the answer was ${response.status}`);
}

export const get = async (path) => answer(await fetch(`/api/v1${path}`));

export const post = async (path, body) =>
  answer(await fetch(`/api/v1${path}`, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) }));

// Calls `onState` with every state of a run, `onLine` with whether the line is up. Where there is no room for live
// events, the state is fetched now and then.
export function follow(run, onState, onLine) {
  const source = new EventSource(`/api/v1/runs/${run}/events`);
  source.addEventListener("state", (event) => {
    onLine(true);
    onState(JSON.parse(event.data));
  });
  source.onerror = () => {
    onLine(false);
    if (source.readyState !== EventSource.CLOSED) return; // the browser tries again by itself
    const again = 20000 + 20000 * Math.random();
    get(`/runs/${run}`).then(onState, () => {});
    setTimeout(() => follow(run, onState, onLine), again);
  };
}

// At most once in a while, and not all viewers at the same moment.
export function seldom(action, seconds) {
  let waiting = false, last = -Infinity;
  return () => {
    if (waiting) return;
    waiting = true;
    const now = performance.now();
    const wait = Math.max(0, last + 1000 * seconds - now) + (last > 0 ? 2000 * Math.random() : 0);
    setTimeout(async () => {
      [waiting, last] = [false, performance.now()];
      try { await action(); } catch (error) { if (!(error instanceof Refusal || error instanceof TypeError)) throw error; }
    }, wait);
  };
}
