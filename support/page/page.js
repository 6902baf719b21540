// What the page does in the browser beside gradio's components. Run once, at its start; TEXTS holds the texts in both languages.
const say = TEXTS[navigator.language.startsWith("zh") ? "zh" : "en"];
const find = (selector) => document.querySelector(selector);
const draft = sessionStorage.getItem("draft") ?? ""; // before gradio empties the composer
const composer = () => find("#question textarea");
for (const left of ["pagehide", "visibilitychange"])
  addEventListener(left, () => sessionStorage.setItem("draft", composer().value));
const told = {}; // what is wrong now: {key of a text: whether}
const tell = (key, wrong) => {
  told[key] = wrong;
  find("#notice p").textContent = Object.keys(told).filter((key) => told[key]).map((key) => say[key]).join(" ");
};
document.documentElement.lang = navigator.language;
document.documentElement.style.cssText += `--before: "${say.base}"; --after: "${say.tuned}"`;

// A server that was restarted knows no sign-in any more. The composer's text outlives the reload.
const fetched = window.fetch;
window.fetch = async (...request) => {
  const answer = await fetched(...request);
  if (answer.status === 401) location.reload();
  return answer;
};

// The panels. On a narrow page they lie over the conversation.
const narrow = matchMedia("(max-width: 768px)");
const open = (panel, wanted) => {
  if (find(panel).classList.contains("open") !== wanted) find(`${panel} .toggle-button`).click();
};
narrow.onchange = () => {
  open("#roles", !narrow.matches);
  if (narrow.matches) open("#settings", false);
};
for (const name of ["roles", "settings"]) {
  find(`#${name}`).setAttribute("role", "region");
  for (const part of [`#${name}`, `#${name} .toggle-button`]) find(part).ariaLabel = say[name];
}

// What is kept. gradio's BrowserState writes it encrypted, and tells nobody where there is no room.
const keep = Storage.prototype.setItem;
const full = new Set();
Storage.prototype.setItem = function (key, value) {
  try {
    keep.call(this, key, value);
    full.delete(key);
  } catch (error) {
    full.add(key);
    throw error;
  } finally {
    tell("full", full.size > 0);
  }
};
let seen; // the conversations as this tab has read or written them
const loadAnew = () => {
  if (!told.stale || document.hidden) return;
  if (!find("#question .stop-button, .edit-textarea, #settings :focus, #roles :focus")) location.reload();
};
addEventListener("storage", ({ key }) => {
  if (key === "role-play-2-settled") tell("stale", true);
  loadAnew();
});
document.addEventListener("visibilitychange", loadAnew);

// A message's text lies in the page escaped (look.py), and is copied and edited as it reads.
const plain = (text) => text.replaceAll("&lt;", "<").replaceAll("&amp;", "&");
const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
const retype = (field, text) => {
  field.value = text;
  field.dispatchEvent(new Event("input"));
};
if (navigator.clipboard) {
  const write = navigator.clipboard.writeText.bind(navigator.clipboard);
  navigator.clipboard.writeText = (text) => write(plain(text));
}
document.addEventListener("copy", (event) => {
  if (event.target.parentNode !== document.body) return; // gradio's way where the page is not secure: a field of its own
  event.clipboardData.setData("text/plain", plain(event.target.value));
  event.preventDefault();
});
document.addEventListener("focusin", ({ target }) => {
  if (!target.matches(".edit-textarea") || target.plain) return;
  target.plain = true;
  setTimeout(() => retype(target, plain(target.value)));
});
const buttons = (field) => field.closest(".message-row").nextElementSibling;
document.addEventListener("click", ({ target }) => {
  const field = find(".edit-textarea");
  if (field && buttons(field).contains(target)) retype(field, escaped(field.value));
  const first = target.closest("#log .option, #log .example") && !find("#log .user-row");
  if (first) composer().focus();
}, true);
document.addEventListener("keydown", (event) => {
  const field = event.target.closest(".edit-textarea"), enter = event.key === "Enter" && !event.shiftKey;
  if (event.isComposing || !(event.key === "Escape" || (field && enter))) return;
  if (!field) return ["#roles", "#settings"].forEach((panel) => open(panel, false));
  event.preventDefault();
  buttons(field).querySelectorAll("button")[enter ? 0 : 1].click(); // submit, cancel
  composer().focus();
});
document.addEventListener("mouseover", ({ target }) => {
  const line = target.closest("#number li, #number input");
  if (line) line.title = line.innerText || line.value;
});

// For the listeners of web_demo.py.
window.page = {
  start: (kept, ...values) => {
    open("#roles", !narrow.matches);
    const role = sessionStorage.getItem("role") || kept.role; // each tab keeps to its own
    return [{ ...kept, role }, ...values.slice(0, -1), draft]; // what is typed is the last of the values
  },
  chosen: () => {
    if (narrow.matches) open("#roles", false);
    composer().focus();
  },
  kept: (kept, growing, personas) => {
    sessionStorage.setItem("role", kept.role);
    document.title = kept.role || document.title;
    const now = JSON.stringify([kept.chats, personas]);
    if (growing.version) return;
    if (seen !== undefined && seen !== now) {
      localStorage.setItem("role-play-2-settled", Date.now()); // other tabs hear of it
      tell("stale", false);
    }
    seen = now;
  },
  described: (text, kept, personas) => ({ ...personas, [kept.role]: text }),
  compared: (on) => find("#main").classList.toggle("both", on),
  sure: (key) => () => {
    if (!confirm(say[key])) throw "no"; // gradio runs no `success` after it
  },
  download: (lines) => {
    const href = URL.createObjectURL(new Blob([lines]));
    if (lines) Object.assign(document.createElement("a"), { download: "conversation.jsonl", href }).click();
  },
};
