// Edits that follow the hand: a change waits a moment, the newest wins, and what it makes stale is cancelled.

import { events, pictureOf } from "./api.js";

const PAUSE = 140;
const LONGEST = 500; // two requests a second are within the usual limits of a key

export class Live {
  /**
   * `make()` gives the body of the request, or null where there is nothing to ask yet. The listener has
   * `started(body)`, `stepped(step, steps, picture)`, `answered(answer, body, milliseconds)`, `failed(error)`.
   */
  constructor(make, listener) {
    Object.assign(this, { make, listener });
    this.timer = null;
    this.first = 0;
    this.running = null;
  }

  /** Something changed. */
  change() {
    const now = performance.now();
    if (this.timer === null) this.first = now;
    clearTimeout(this.timer);
    // Whoever drags on and on still sees something.
    this.timer = setTimeout(() => this.now(), Math.max(0, Math.min(PAUSE, this.first + LONGEST - now)));
  }

  /** Asks at once. */
  async now() {
    clearTimeout(this.timer);
    this.timer = null;
    this.stop();
    const mine = new AbortController();
    this.running = mine;
    const began = performance.now();
    try {
      const body = await this.make();
      if (!body || mine.signal.aborted) return;
      this.listener.started(body);
      for await (const { event, data } of events("v1/edits", body, mine.signal)) {
        if (mine.signal.aborted) return;
        if (event === "step") {
          const picture = data.pictures?.[0] ?? data.previews?.[0] ?? null;
          this.listener.stepped(data.step, data.steps, picture && pictureOf(picture.image ?? picture));
        } else if (event === "result") {
          await this.listener.answered(data, body, performance.now() - began);
        }
      }
    } catch (error) {
      // While a newer change waits, this edit is of no interest any more.
      if (error.name !== "AbortError" && !mine.signal.aborted && this.timer === null) this.listener.failed(error);
    } finally {
      if (this.running === mine) this.running = null;
    }
  }

  /** Cancels what runs; the service stops within a step. */
  stop() {
    this.running?.abort();
    this.running = null;
  }
}
