// Pictures and videos that go with the next question: chosen, dropped or pasted, put in order, looked at first.

const find = (id) => document.getElementById(id);
/** Formats that browsers show. Of others (TIFF) only the server can say whether they are whole. */
const SHOWN = /^image\/(png|jpeg|webp|gif|bmp|svg\+xml|avif)$/;

/**
 * @typedef {{kind: "image" | "video", name: string, url: string, broken?: boolean}} Attachment
 * @type {Attachment[]}
 */
let attached = [];
/** @type {Attachment | null} being moved */
let moving = null;
let changed = () => {};

export const current = () => [...attached];
export const broken = () => attached.filter((each) => each.broken).map((each) => each.name);
export const onChange = (handler) => (changed = handler);

export function replace(others) {
  attached = [...others];
  render();
}

function asDataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

/** Whether a browser can show it to its last row; a picture that breaks off is shown in part, without an error. */
async function canBeShown(file) {
  if (!SHOWN.test(file.type)) return true;
  try {
    (await createImageBitmap(file)).close();
    return true;
  } catch {
    return false;
  }
}

/** @returns {Promise<string>} what is wrong with the files; empty where nothing is */
export async function attach(files) {
  const usable = [...files].filter((file) => /^(image|video)\//.test(file.type));
  const faults = usable.length < files.length ? ["Only pictures and videos can be attached."] : [];
  for (const file of usable) {
    const kind = file.type.startsWith("video/") ? "video" : "image";
    const name = unusedName(file.name || (kind === "video" ? "video.mp4" : "picture.png"));
    const each = { kind, name, url: await asDataUrl(file), broken: kind === "image" && !(await canBeShown(file)) };
    if (each.broken) faults.push(`${name} is damaged or not a picture.`);
    attached.push(each);
  }
  render();
  return faults.join(" ");
}

/** Pasted pictures all have one name; in the Python code each is a file. */
function unusedName(name) {
  const [, stem, ending] = /^(.*?)(\.[^.]*)?$/.exec(name);
  const taken = new Set(attached.map((each) => each.name));
  let free = name;
  for (let number = 2; taken.has(free); number++) free = `${stem}-${number}${ending ?? ""}`;
  return free;
}

/** The picture or video itself; `size` gets its measures. */
export function preview(each, size) {
  if (each.kind === "video") {
    const video = Object.assign(document.createElement("video"), { muted: true, preload: "metadata", src: each.url });
    video.setAttribute("aria-label", each.name);
    video.onloadedmetadata = () => {
      if (size) size.textContent = `${video.duration.toFixed(1)} s`;
    };
    return video;
  }
  const image = Object.assign(new Image(), { alt: each.name, src: each.url, draggable: false });
  image.onload = () => {
    if (size) size.textContent = `${image.naturalWidth} × ${image.naturalHeight}`;
  };
  return image;
}

function move(each, to) {
  const from = attached.indexOf(each);
  if (from < 0 || to < 0 || to >= attached.length || to === from) return;
  attached.splice(from, 1);
  attached.splice(to, 0, each);
  render();
}

function item(each, index) {
  const made = find("attachment-template").content.cloneNode(true);
  const [li, handle, remove] = ["li", ".handle", ".remove"].map((selector) => made.querySelector(selector));
  const size = made.querySelector(".size");
  li.classList.toggle("broken", Boolean(each.broken));
  handle.prepend(preview(each, each.broken ? null : size));
  if (each.broken) size.textContent = "damaged";
  made.querySelector(".name").textContent = handle.title = each.name;
  const place = attached.length > 1 ? `, ${index + 1} of ${attached.length}; arrow keys move it` : "";
  handle.setAttribute("aria-label", `${each.name}${each.broken ? ", damaged" : ""}${place}`);
  handle.onkeydown = (event) => {
    const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    move(each, index + step);
    find("attachments").children[attached.indexOf(each)].querySelector(".handle").focus();
  };
  li.ondragstart = (event) => {
    moving = each;
    event.dataTransfer.effectAllowed = "move";
    event.dataTransfer.setData("text/plain", each.name);
  };
  li.ondragend = () => (moving = null);
  li.ondragover = (event) => moving && event.preventDefault();
  li.ondrop = (event) => {
    if (!moving) return;
    event.preventDefault();
    event.stopPropagation();
    move(moving, index);
  };
  remove.setAttribute("aria-label", `Remove ${each.name}`);
  remove.onclick = () => {
    attached = attached.filter((other) => other !== each);
    render();
    find("choose").focus();
  };
  return made;
}

function render() {
  find("attachments").replaceChildren(...attached.map(item));
  changed();
}

// --- an example -----------------------------------------------------------------------------------

const COLOURS = { red: "#d71e23", green: "#1e9632", blue: "#2346d7", yellow: "#f5dc28", purple: "#8728aa" };
const SHAPES = {
  circle: (pen, x, y, r) => pen.arc(x, y, r, 0, 2 * Math.PI),
  square: (pen, x, y, r) => pen.rect(x - 0.7 * r, y - 0.7 * r, 1.4 * r, 1.4 * r),
  triangle: (pen, x, y, r) => {
    for (const turn of [0, 1, 2]) {
      const angle = (turn / 3) * 2 * Math.PI - Math.PI / 2;
      pen.lineTo(x + r * Math.cos(angle), y + r * Math.sin(angle));
    }
  },
};

/** Attach a shape on a plain ground; returns a question about it. */
export function drawExample() {
  const pick = (things) => things[Math.floor(Math.random() * things.length)];
  const shape = pick(Object.keys(SHAPES));
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 112;
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#8c8c8c";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.beginPath();
  SHAPES[shape](pen, 56, 56, 26);
  pen.closePath();
  pen.fillStyle = pick(Object.values(COLOURS));
  pen.fill();
  replace([{ kind: "image", name: "example.png", url: canvas.toDataURL("image/png") }]);
  return `What colour is the ${shape}?`;
}
