// The image with its boxes: on the page as elements, in a download as pixels.

// Hues a golden angle apart, of one lightness that white text can be read on.
export const color = (index) => `oklch(0.53 0.17 ${(29 + index * 137.5) % 360})`;

export const label = (found) => `${found.name} ${found.score.toFixed(2)}`;

// An element for each detection, largest first, so that small ones can be reached. `light` is called with a phrase and a detection, or with nothing.
export function showBoxes(place, answer, shown, light) {
  const area = ({ box: [x1, y1, x2, y2] }) => (x2 - x1) * (y2 - y1);
  const percent = (value, whole) => `${(100 * value) / whole}%`;
  place.replaceChildren(
    ...[...shown].sort((one, other) => area(other) - area(one)).map((found) => {
      const [x1, y1, x2, y2] = found.box;
      const element = document.createElement("div");
      element.className = y1 < answer.height * 0.06 ? "box inside" : "box";
      element.tabIndex = 0;
      element.setAttribute("role", "listitem");
      element.setAttribute("aria-label", `${found.name}, score ${found.score.toFixed(2)}`);
      Object.assign(element.dataset, { phrase: found.phrase, score: found.score });
      element.style.setProperty("--own", color(found.phrase));
      element.style.left = percent(x1, answer.width);
      element.style.top = percent(y1, answer.height);
      element.style.width = percent(x2 - x1, answer.width);
      element.style.height = percent(y2 - y1, answer.height);
      const text = document.createElement("span");
      text.textContent = label(found);
      element.append(text);
      for (const event of ["mouseenter", "focus"]) element.addEventListener(event, () => light(found.phrase, element));
      for (const event of ["mouseleave", "blur"]) element.addEventListener(event, () => light());
      return element;
    }),
  );
}

// A PNG of the image with its boxes, in pixels of the image.
export function drawn(image, answer, shown) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [answer.width, answer.height];
  const pen = canvas.getContext("2d");
  pen.drawImage(image, 0, 0, answer.width, answer.height);
  const size = Math.max(11, Math.round(Math.min(answer.width, answer.height) / 32));
  pen.font = `600 ${size}px system-ui, sans-serif`;
  pen.textBaseline = "top";
  pen.lineWidth = Math.max(2, size / 8);
  for (const found of shown) {
    const [x1, y1, x2, y2] = found.box;
    pen.strokeStyle = pen.fillStyle = color(found.phrase);
    pen.strokeRect(x1, y1, x2 - x1, y2 - y1);
    const top = y1 < size * 1.3 ? y1 : y1 - size * 1.3;
    pen.fillRect(x1, top, pen.measureText(label(found)).width + size / 2, size * 1.3);
    pen.fillStyle = "#fff";
    pen.fillText(label(found), x1 + size / 4, top + size * 0.15);
  }
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}
