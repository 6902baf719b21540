// What the page does in the browser beside gradio's components. Run once, at its start; TEXTS holds both languages.
const say = TEXTS[navigator.language.startsWith("zh") ? "zh" : "en"];
const find = (selector) => document.querySelector(selector), composer = () => find("#question textarea");
const wrong = {}; // what the line above the conversation says, as long as it is so
const tell = (key, so) => {
  if (Boolean(wrong[key]) === Boolean(so)) return;
  wrong[key] = so ? say[key] : "";
  find("#notice p").textContent = Object.values(wrong).join(" ").trim();
};
document.documentElement.lang = navigator.language;
document.documentElement.style.cssText += `--before: "${say.base}"; --after: "${say.tuned}"`;

// What is typed outlives the page: a reload, a lost connection, a server that was restarted and knows no sign-in any more.
const draft = sessionStorage.getItem("draft") ?? "";
const hold = () => sessionStorage.setItem("draft", composer().value);
addEventListener("pagehide", hold), addEventListener("visibilitychange", hold);
const fetched = window.fetch;
window.fetch = (...request) => fetched(...request).then((answer) => (answer.status === 401 && location.reload(), answer));

// The panels. On a narrow page they lie over the conversation.
const narrow = matchMedia("(max-width: 768px)"), panels = ["roles", "settings"];
const open = (panel, so) => find(`#${panel}`).classList.contains("open") !== so && find(`#${panel} .toggle-button`).click();
narrow.onchange = () => panels.forEach((panel) => open(panel, panel === "roles" && !narrow.matches));
for (const panel of panels) {
  find(`#${panel}`).setAttribute("role", "region");
  find(`#${panel}`).ariaLabel = find(`#${panel} .toggle-button`).ariaLabel = say[panel];
}

// The browser's storage. Where it has no room, gradio's BrowserState tells nobody; and other tabs write to it, too.
const keep = Storage.prototype.setItem, full = new Set();
Storage.prototype.setItem = function (key, value) {
  try { full.add(key), keep.call(this, key, value), full.delete(key) } finally { tell("full", full.size) }
};
const loadAnew = () => {
  const busy = find("#question .stop-button, .edit-textarea, #settings :focus, #roles :focus");
  if (wrong.stale && !busy && !document.hidden) location.reload();
};
addEventListener("storage", ({ key }) => (tell("stale", wrong.stale || key === "role-play-2-settled"), loadAnew()));
addEventListener("visibilitychange", loadAnew);

// A message lies in the page escaped (look.py). It is copied and edited as it reads.
const plain = (text) => text.replaceAll("&lt;", "<").replaceAll("&amp;", "&");
const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
const retype = (field, text) => ((field.value = text), field.dispatchEvent(new Event("input")));
const buttons = (field) => field.closest(".message-row").nextElementSibling;
const write = navigator.clipboard?.writeText.bind(navigator.clipboard);
if (write) navigator.clipboard.writeText = (text) => write(plain(text));
addEventListener("copy", (event) => {
  if (event.target.parentNode !== document.body) return; // a field of gradio's own, where the page is not secure
  event.clipboardData.setData("text/plain", plain(event.target.value));
  event.preventDefault();
});
addEventListener("focusin", ({ target }) => {
  if (!target.matches(".edit-textarea") || target.ariaLabel) return;
  target.ariaLabel = say.edit;
  setTimeout(() => retype(target, plain(target.value)));
});
addEventListener("click", ({ target }) => {
  const field = find(".edit-textarea");
  if (field && buttons(field).contains(target)) retype(field, escaped(field.value)); // gradio shows it as it is
  if (target.closest("#log .option, #log .example") && !find("#log .user-row")) composer().focus();
}, true);
addEventListener("keydown", (event) => {
  const field = event.target.closest(".edit-textarea"), enter = field && event.key === "Enter" && !event.shiftKey;
  if (event.isComposing || !(enter || event.key === "Escape")) return;
  if (!field) return panels.forEach((panel) => open(panel, false));
  event.preventDefault();
  buttons(field).querySelectorAll("button")[enter ? 0 : 1].click(); // submit, cancel
  composer().focus();
});
addEventListener("mouseover", ({ target }) => {
  const line = target.closest("#number li, #number input");
  if (line) line.title = line.innerText || line.value;
});

let seen; // the conversations as this tab has read or written them
window.page = { // for the listeners of web_demo.py
  start: (kept, ...values) => {
    open("roles", !narrow.matches);
    const role = sessionStorage.getItem("role") || kept.role; // each tab keeps to its own
    return [{ ...kept, role }, ...values.slice(0, -1), draft]; // what is typed is the last of the values
  },
  chosen: () => (narrow.matches && open("roles", false), composer().focus()),
  kept: (kept, growing, personas) => {
    sessionStorage.setItem("role", kept.role);
    document.title = kept.role || document.title;
    const now = JSON.stringify([kept.chats, personas]);
    if (growing.version || seen === now) return;
    if (seen) localStorage.setItem("role-play-2-settled", Date.now()); // other tabs hear of it
    tell("stale", false);
    seen = now;
  },
  described: (text, kept, personas) => ({ ...personas, [kept.role]: text }),
  compared: (on) => find("#main").classList.toggle("both", on),
  sure: (key) => () => { if (!confirm(say[key])) throw "no" }, // gradio runs no `success` after it
  download: (lines) => {
    const href = URL.createObjectURL(new Blob([lines]));
    if (lines) Object.assign(document.createElement("a"), { download: "conversation.jsonl", href }).click();
  },
};
