/** Keeps the end of a growing conversation in sight, unless somebody has scrolled away from it. */

import type { Attachment } from "svelte/attachments";

/** As near to the end as counts as being there, in pixels. */
const NEAR = 32;

/** Return what makes an element follow the end of its only child while `follows()`; `onscroll` is told where it is. */
export function follow(follows: () => boolean, onscroll: (atEnd: boolean) => void): Attachment<HTMLElement> {
  return (scroller) => {
    const grown = new ResizeObserver(() => {
      if (follows()) scroller.scrollTop = scroller.scrollHeight;
      else look();
    });
    const look = () => onscroll(scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR);
    scroller.addEventListener("scroll", look, { passive: true });
    grown.observe(scroller.firstElementChild!);
    grown.observe(scroller);
    return () => {
      scroller.removeEventListener("scroll", look);
      grown.disconnect();
    };
  };
}
