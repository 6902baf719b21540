// The sign-in form, where the page has a password.
const { texts } = JSON.parse(document.getElementById("facts").textContent);
document.body.className = "login";
document.body.innerHTML = `<main><form><h1></h1><label><span></span><input name="user" autocomplete="username" required
  autofocus></label><label><span></span><input name="password" type="password" autocomplete="current-password" required>
  </label><button class="strong"></button><p role="alert"></p></form></main>`;
const form = document.querySelector("form");
form.querySelector("h1").textContent = form.querySelector("button").textContent = texts.sign_in_title;
form.querySelectorAll("span").forEach((span, number) => (span.textContent = [texts.user, texts.password][number]));
form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const account = `${form.user.value}:${form.password.value}`;
  const headers = { "content-type": "application/json" };
  try {
    const response = await fetch("/login", { method: "POST", headers, body: JSON.stringify({ account }) });
    if (response.ok) location.reload();
    else form.querySelector("p").textContent = (await response.json()).error;
  } catch {
    form.querySelector("p").textContent = texts.lost;
  }
});
