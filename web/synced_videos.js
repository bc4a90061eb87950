// @ts-check
/** Plays several videos by one clock, over and over, so that none is ahead of the other. */

/** A video that is further off than this is put right; less is not seen, and every correction costs a stutter. */
const DRIFT_S = 0.08;

/**
 * @param {HTMLVideoElement[]} videos
 * @returns {{ toggle(): boolean, restart(): void, destroy(): void }} `toggle` returns whether they play now
 */
export function syncVideos(videos) {
  let isPlaying = true;
  let clock_s = 0;
  let last_ms = performance.now();
  let handle = 0;
  const isReady = () => videos.every((video) => video.readyState >= 2 && video.duration > 0);
  const step = (/** @type {number} */ now_ms) => {
    handle = requestAnimationFrame(step);
    const passed_s = (now_ms - last_ms) / 1000;
    last_ms = now_ms;
    if (!isReady()) return; // both wait until both can begin
    if (isPlaying) clock_s = (clock_s + passed_s) % Math.max(...videos.map((video) => video.duration));
    for (const video of videos) {
      const due_s = Math.min(clock_s, video.duration - 0.001);
      if (Math.abs(video.currentTime - due_s) > DRIFT_S && !video.seeking) video.currentTime = due_s;
      if (isPlaying && video.paused && clock_s < video.duration) video.play().catch(() => {});
      if (!isPlaying && !video.paused) video.pause();
    }
  };
  handle = requestAnimationFrame(step);
  return {
    toggle() {
      isPlaying = !isPlaying;
      return isPlaying;
    },
    restart() {
      clock_s = 0;
      isPlaying = true;
    },
    destroy() {
      cancelAnimationFrame(handle);
      for (const video of videos) {
        video.pause();
        video.removeAttribute("src");
        video.load(); // lets go of the connection
      }
    },
  };
}
