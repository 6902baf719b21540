"""Chat with a role in the browser.

    python3 web_demo.py --device 0 --model_path "output_dir/epoch-1-step-1002-merge" --desc_path "data/profiles-zh_desc.json"
    python3 web_demo.py --model_path Baichuan2-7B-Chat/ --adapter_path output_dir/epoch-1-step-1002    # before and after
    python3 web_demo.py --ask "你是谁？" --role 李白        # one greedy answer on the terminal, and no page

In the order of reading: the arguments, a conversation, the page. Beside it stand support/speaker.py, which answers,
support/page_guard.py, which checks everything a browser sends; page.css, page.js and page_texts.json, its look and its texts.
"""

import json
import os
import re
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at gradio's import: the page reports to nobody

from data_helper import conversation, example_questions, persona, read_profiles
from support.arguments import ArgumentParser
from support.errors import Problems, UserError, entry_point, slow_imports
from support.json_files import text_problem

SUPPORT = Path(__file__).parent / "support"
PERIOD = 0.05  # seconds between two updates of a growing answer


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_path", default="output_dir/epoch-1-step-1002-merge", help="directory of a whole model")
    parser.add_argument("--adapter_path", help="directory of a PEFT adapter over --model_path, served without merging")
    parser.add_argument("--desc_path", default="data/profiles-zh_desc.json", help="JSON file {role: description}")
    parser.add_argument("--device", default="auto", help="a GPU's number; cpu (or -1); auto: a GPU where there is one")
    parser.add_argument("--server_name", default="127.0.0.1", help="address to listen on; 0.0.0.0 opens it to others")
    parser.add_argument("--port", type=int, default=9090, help="TCP port of the page")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="what visitors sign in with (default: no sign-in)")
    parser.add_argument("--ask", metavar="QUESTION", help="print one greedy answer instead of serving the page")
    parser.add_argument("--role", help="the role that --ask asks (default: the first of --desc_path)")
    return parser.parse_args(argv)


# After the arguments, since these take seconds.
with slow_imports(parse_args, __name__):
    import gradio as gr
    import torch
    from starlette.middleware import Middleware

    from support import page_guard as guard
    from support.model_directory import ModelDirectory, pick_device
    from support.speaker import Speaker, TooLong


def check(args) -> tuple[torch.device, dict[str, str]]:
    """The device, and the roles with their descriptions. Raises: UserError with all that is wrong, before slow work."""
    with Problems() as problems:
        problems.of(ModelDirectory(args.model_path).check)
        device = problems.of(pick_device, args.device)
        profiles = problems.of(read_profiles, Path(args.desc_path))
        if args.adapter_path and not (Path(args.adapter_path) / "adapter_config.json").is_file():
            problems.append(
                f"{args.adapter_path}: has no adapter_config.json: give a directory that train.py has written"
            )
        if args.role is not None and profiles and args.role not in profiles:
            problems.append(f"--role {args.role}: {args.desc_path} has {', '.join(profiles)}")
        if args.auth is not None and not re.fullmatch("[^:]+:.+", args.auth):
            problems.append("--auth: must be USER:PASSWORD, neither of them empty")
        if args.ask is not None and (problem := text_problem(args.ask)):
            problems.append(f"--ask {problem}")
        if args.ask is None:
            problems += guard.port_problems(args.server_name, args.port)
    return device, profiles


# ---------------------------------------------------------------- a conversation


@dataclass
class Conversation:
    """What one browser tab has said so far. It is in the server's memory and nowhere else."""

    # Each: role, system, prompt, response, base (the base model's response), settings, compare, attempt, answering.
    rounds: list[dict] = field(default_factory=list)

    @property
    def answering(self) -> bool:
        return bool(self.rounds) and self.rounds[-1]["answering"]

    def messages(self, column: str) -> list[dict]:
        """What the model reads. column: response or base; the base model continues its own answers where it has any."""
        last = self.rounds[-1]
        messages = [{"role": "system", "content": last["system"]}]
        for past in self.rounds[:-1]:
            messages.append({"role": "user", "content": past["prompt"]})
            messages.append({"role": "assistant", "content": past[column] or past["response"]})
        return [*messages, {"role": "user", "content": last["prompt"]}]

    def bubbles(self, column: str) -> list[dict]:
        """What gr.Chatbot shows."""
        pairs = [pair for past in self.rounds for pair in (("user", past["prompt"]), ("assistant", past[column]))]
        return [
            {"role": role, "content": [{"type": "text", "text": guard.literal(text)}]} for role, text in pairs if text
        ]


# ---------------------------------------------------------------- the page

# What the browser does with the lines of a download.
SAVE = """(lines) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines], {type: "application/jsonl"}));
  link.download = "conversation.jsonl";
  link.click();
}"""


class Page:
    """The page's components, and what happens at each of their events to the Conversation of a browser tab."""

    def __init__(self, speaker: Speaker, profiles: dict[str, str], examples: dict[str, list[str]]):
        self.speaker, self.profiles, self.examples = speaker, profiles, examples

    # `form` is the role, its description, the switch to compare, do_sample and the values of guard.SETTINGS.
    def ask(self, request: gr.Request, conversation, question, *form):
        return self.put(request, conversation, len(conversation.rounds), question, form)

    def ask_example(self, request: gr.Request, event: gr.EventData, conversation, *form):
        example = guard.event_field(event, "value")
        return self.ask(request, conversation, example.get("text") if isinstance(example, dict) else None, *form)

    def retry(self, request: gr.Request, event: gr.EventData, conversation, *form):
        number = guard.checked_round(request, event, len(conversation.rounds))
        last = conversation.rounds[number]
        return self.put(request, conversation, number, last["prompt"], form, last["attempt"] + 1)

    def edit(self, request: gr.Request, event: gr.EventData, conversation, *form):
        number = guard.checked_round(request, event, len(conversation.rounds))
        return self.put(request, conversation, number, guard.event_field(event, "value"), form)

    def put(self, request, conversation, number: int, question, form, attempt: int = 0):
        """Check everything, and make `question` the conversation's last, as round `number`; then comes `answer`."""
        if conversation.answering:
            raise guard.Refusal(request, "busy")
        role, description, compare, *settings = form
        role = guard.checked_text(request, "role", role, guard.MAX_NAME)
        system = persona(role, guard.checked_text(request, "description", description, guard.MAX_DESCRIPTION))
        question = guard.checked_text(request, "question", question, guard.MAX_QUESTION)
        compare = guard.checked_switch(request, "compare", compare) and self.speaker.adapter is not None
        settings = guard.checked_settings(request, *settings)
        kept = [past for past in conversation.rounds[:number] if past["response"] and past["role"] == role]
        if len(kept) >= guard.MAX_ROUNDS:
            raise guard.Refusal(request, "too_old", most=guard.MAX_ROUNDS)
        asked = {"role": role, "system": system, "prompt": question, "response": "", "base": ""}
        asked |= {"settings": settings, "compare": compare, "attempt": attempt, "answering": True}

        wanted = settings["max_new_tokens"]
        try:
            _, room, forgotten = self.speaker.fit(Conversation([*kept, asked]).messages("response"), wanted)
        except TooLong as error:
            raise guard.Refusal(request, "too_long", needed=error.needed, context=error.context) from None
        notes = [guard.say(request, "cut", room=room, wanted=wanted)] if room < wanted else []
        notes += [guard.say(request, "forgotten")] if forgotten else []
        notes += [guard.say(request, "greedy")] if attempt and not settings["do_sample"] else []
        conversation.rounds = [*kept, asked]
        return *self.shown(conversation), " ".join(notes), gr.Textbox(value="", submit_btn=False, stop_btn=True)

    def answer(self, request: gr.Request, conversation):
        """Stream the answer, then the base model's if it was asked for. gradio closes this when the visitor leaves."""
        if not conversation.answering:
            raise guard.Refusal(request, "no_round")
        last = conversation.rounds[-1]
        settings = dict(last["settings"])
        if settings["seed"] is not None:
            settings["seed"] += last["attempt"]  # another attempt, another answer; and that one too can be had again
        try:
            for column in ("response", "base")[: 1 + last["compare"]]:
                due, text = 0.0, ""
                messages = conversation.messages(column)
                with closing(self.speaker.answer(messages, settings, base=column == "base")) as stream:
                    for text in stream:
                        if time.monotonic() >= due:
                            last[column] = text
                            yield self.shown(conversation)
                            due = time.monotonic() + PERIOD
                last[column] = text
                yield self.shown(conversation)
        except MemoryError:
            raise guard.Refusal(request, "memory") from None
        finally:
            last["answering"] = False

    def stop(self, conversation):
        if conversation.answering:  # though perhaps still waiting in the queue
            conversation.rounds[-1]["answering"] = False
        return self.button(conversation)

    def button(self, conversation):
        """To send while there is nothing to stop."""
        return gr.Textbox(submit_btn=not conversation.answering, stop_btn=conversation.answering)

    def undo(self, request: gr.Request, event: gr.EventData, conversation):
        """Take a question back into the text box, and away what followed."""
        if conversation.answering:
            raise guard.Refusal(request, "busy")
        number = guard.checked_round(request, event, len(conversation.rounds))
        question = conversation.rounds[number]["prompt"]
        conversation.rounds = conversation.rounds[:number]
        return *self.shown(conversation), "", question

    def clear(self, conversation):
        conversation.rounds = []  # the same object: an answer that is being stopped has nothing else to write to
        return *self.shown(conversation), "", self.button(conversation)

    def change_role(self, request: gr.Request, conversation, role):
        role = guard.checked_text(request, "role", role, guard.MAX_NAME)
        note = guard.say(request, "new_role") if conversation.rounds else ""
        _, _, base, _, button = self.clear(conversation)
        chat = gr.Chatbot(value=[], examples=[{"text": question} for question in self.examples.get(role, [])])
        return conversation, chat, base, note, button, self.profiles.get(role, "")

    def download(self, conversation) -> str:
        """JSON lines as train.py reads them: a line for each round, by itself, since a training sample has no history."""
        keys = ("role", "system", "prompt", "response")
        lines = [{key: past[key] for key in keys} for past in conversation.rounds if past["response"]]
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    def shown(self, conversation):
        compared = any(past["compare"] for past in conversation.rounds)
        return conversation, conversation.bubbles("response"), conversation.bubbles("base") if compared else []

    def build(self) -> gr.Blocks:
        """`preprocess=False` throughout: values arrive as the browser sent them, and support/page_guard.py checks them."""
        text, first = gr.I18n(), next(iter(self.profiles))
        tuned, defaults = self.speaker.adapter is not None, self.speaker.model.generation_config
        with gr.Blocks(title="Baichuan2 · 角色对话", fill_height=True, analytics_enabled=False) as demo:
            conversation = gr.State(Conversation())
            with gr.Sidebar(width=340):
                description = gr.Textbox(
                    self.profiles[first],
                    label=text("description"),
                    lines=4,
                    max_lines=9,
                    max_length=guard.MAX_DESCRIPTION,
                )
                compare = gr.Checkbox(False, label=text("compare"), visible=tuned)
                with gr.Accordion(text("settings")):
                    settings = [gr.Checkbox(bool(defaults.do_sample), label=text("do_sample"))]
                    for name, (kind, low, high, step) in guard.SETTINGS.items():
                        value = getattr(defaults, name, None)
                        value = min(max(kind(high if value is None else value), low), high)
                        slider = {"value": value, "step": step, "label": text(name), "buttons": []}
                        number = name == "seed"
                        settings.append(gr.Number(-1, label=text(name)) if number else gr.Slider(low, high, **slider))
                download = gr.Button(text("download"), size="sm")
                lines = gr.Textbox(visible=False)
            with gr.Row(elem_id="bar"):
                role = gr.Dropdown(list(self.profiles), value=first, label=text("role"), allow_custom_value=True)
                fresh = gr.Button(text("fresh"))
            gr.Markdown(text("stand_in"), visible=hasattr(self.speaker.model.config, "stand_in"), elem_id="stand_in")
            with gr.Row():
                chat = gr.Chatbot(
                    label=text("tuned" if tuned else "chat"),
                    placeholder=text("greeting"),
                    examples=[{"text": question} for question in self.examples[first]],
                    elem_id="chat",
                    editable="user",
                    buttons=["copy"],
                    render_markdown=False,
                )
                base_chat = gr.Chatbot(
                    label=text("base"), visible=False, elem_id="base_chat", buttons=["copy"], render_markdown=False
                )
            note = gr.Markdown(elem_id="note")
            question = gr.Textbox(
                show_label=False, placeholder=text("ask"), submit_btn=True, max_lines=8, elem_id="question"
            )

            form = [role, description, compare, *settings]
            shown = [conversation, chat, base_chat]
            hidden = {"preprocess": False, "show_progress": "hidden", "api_visibility": "private"}
            quick = {**hidden, "concurrency_limit": None}
            answers = []
            for listen, put, inputs in (
                (question.submit, self.ask, [conversation, question, *form]),
                (chat.example_select, self.ask_example, [conversation, *form]),
                (chat.retry, self.retry, [conversation, *form]),
                (chat.edit, self.edit, [conversation, *form]),
            ):
                asked = listen(put, inputs, [*shown, note, question], **quick)
                in_turn = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress_on": note}
                answer = asked.success(self.answer, conversation, shown, **hidden | {"show_progress": "full"} | in_turn)
                answer.then(self.button, conversation, question, **quick)
                answers.append(answer)
            question.stop(self.stop, conversation, question, cancels=answers, **quick)
            chat.undo(self.undo, conversation, [*shown, note, question], **quick)
            gr.on(
                [chat.clear, fresh.click], self.clear, conversation, [*shown, note, question], cancels=answers, **quick
            )
            everything = [*shown, note, question, description]
            role.input(self.change_role, [conversation, role], everything, cancels=answers, **quick)
            compare.change(None, compare, base_chat, js="(on) => ({visible: on, __type__: 'update'})")
            download.click(self.download, conversation, lines, **quick).success(None, lines, None, js=SAVE)
        return demo


def answer_once(speaker: Speaker, role: str, description: str, question: str) -> str:
    messages = conversation(persona(role, description), question)
    settings = {"do_sample": False, "seed": 0, "max_new_tokens": speaker.model.generation_config.max_new_tokens or 512}
    try:
        return "".join([*speaker.answer(messages, settings)][-1:])  # the last text is the whole answer
    except (TooLong, MemoryError) as error:
        raise UserError(f"--ask: {error}") from error


@entry_point
def main(argv=None):
    args = parse_args(argv)
    device, profiles = check(args)
    speaker = Speaker.load(args.model_path, args.adapter_path, device)
    if args.ask is not None:
        role = args.role or next(iter(profiles))
        return print(answer_once(speaker, role, profiles[role], args.ask))
    demo = Page(speaker, profiles, example_questions(args.desc_path, profiles)).build()
    if args.auth is None and args.server_name not in ("127.0.0.1", "localhost", "::1"):
        print(f"warning: whoever reaches {args.server_name} can use the page; --auth USER:PASSWORD lets only some in")
    demo.queue(max_size=100).launch(
        server_name=args.server_name,
        server_port=args.port,
        auth=tuple(args.auth.split(":", 1)) if args.auth else None,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        run_history=False,
        state_session_capacity=500,  # conversations in memory; then the oldest go
        app_kwargs={"middleware": [Middleware(guard.Gate, demo=demo)]},
        i18n=gr.I18n(**guard.TEXTS),
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # no font from elsewhere
        css_paths=SUPPORT / "page.css",
        js=(SUPPORT / "page.js").read_text(encoding="utf-8"),
    )
    print(f"{args.model_path} answers on {demo.local_url}", flush=True)
    demo.block_thread()


if __name__ == "__main__":
    main()
