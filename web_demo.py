"""Chat with a role in the browser.

    python3 web_demo.py --device 0 --model_path "output_dir/epoch-1-step-1002-merge" --desc_path "data/profiles-zh_desc.json"
    python3 web_demo.py --model_path Baichuan2-7B-Chat/ --adapter_path output_dir/epoch-1-step-1002    # before and after
    python3 web_demo.py --engine http://127.0.0.1:8080/v1   # the LLaMA export, served by vLLM, SGLang or llama.cpp
    python3 web_demo.py --ask "你是谁？" --role 李白        # one greedy answer on the terminal, and no page

In the order of reading: the arguments, what is on the page, what it does, how it is served. The browser keeps the
conversations (support/page/chats.py); every listener gets them from it and gives them back.
"""

import asyncio
import os
import sys
import time
from contextlib import closing
from pathlib import Path

from data_helper import example_questions, persona
from support.command_line import ArgumentParser, integer, said_if_slow
from support.dialogues.json_files import composed, plain_line_ends
from support.dialogues.profiles import MAX_DESCRIPTION, MAX_NAME, long_profiles, read_characters
from support.dialogues.samples import conversation
from support.errors import Problems, entry_point, slow_imports
from support.files import followed


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model_path", type=Path, default="output_dir/epoch-1-step-1002-merge", help="directory of a whole model")
    add("--adapter_path", type=followed, help="directory of a PEFT adapter over --model_path, served without merging")
    add("--load_in_4bit", action="store_true", help="hold the linear layers in 4 bits: 5 GB instead of 15 at 7B")
    add("--engine", metavar="URL", help="a server with OpenAI's interface that answers instead of --model_path")
    add("--desc_path", type=Path, default="data/profiles-zh_desc.json", help="JSON file {role: description}")
    add("--device", default="auto", help="a GPU's number; cpu (or -1); auto: a GPU where there is one")
    add("--server_name", default="127.0.0.1", help="address to listen on; 0.0.0.0: all of this machine")
    add("--port", type=integer(1, 65535), default=9090, help="TCP port of the page")
    add("--allowed_hosts", nargs="+", default=[], help="further names under which others call the page")
    add("--root_path", default="", help="path under which a proxy serves the page, such as /chat")
    add("--auth_file", type=Path, help="file with USER:PASSWORD, to sign in with; or WEB_DEMO_AUTH in the environment")
    add("--ask", metavar="QUESTION", type=plain_line_ends, help="print one greedy answer instead of serving the page")
    add("--role", type=composed, help="the role that --ask asks (default: the first of --desc_path)")
    return parser.parse_args(argv)


# After the arguments, since these take seconds.
with slow_imports(parse_args, __name__):
    # Read at gradio's import. The page reports to nobody, and asks none but itself, where a proxy would be in the way.
    NO_PROXY = os.environ.get("no_proxy", os.environ.get("NO_PROXY", ""))
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", no_proxy="*")
    import gradio as gr

    from support.device import pick_device
    from support.model.adapter import read_adapter
    from support.model.directory import ModelDirectory
    from support.model.server import Server
    from support.page import chats
    from support.page.hosts import LOCAL, access
    from support.page.look import COLOURS, CSS, I18N, ICON, JS, SIGN_IN, THEME, portrait
    from support.page.speaker import Speaker, TooLong
    from support.page.visit import SETTINGS, Refusal, Visit, warn


def read_inputs(args) -> tuple:
    """The device, the characters, and who may call the page. Raises: UserError with all that is wrong."""
    model, device = None, None
    with Problems() as problems:
        if not args.engine:
            model = problems.of(ModelDirectory(args.model_path).check, args.load_in_4bit)
            device = problems.of(pick_device, args.device)
        elif args.adapter_path or args.load_in_4bit:
            problems.append("--engine: has a model of its own: --adapter_path and --load_in_4bit are for --model_path")
        characters = problems.of(read_characters, args.desc_path) or {}
        for role, character in characters.items():
            image = character["portrait"] and args.desc_path.parent / character["portrait"]
            character["portrait"] = problems.of(portrait, role, image)
        if model and args.adapter_path:
            problems.of(read_adapter, model, args.adapter_path)
        if args.ask is not None and not args.ask.strip():
            problems.append("--ask: is blank: write a question")
        if args.role is not None and characters and args.role not in characters:
            problems.append(f"--role {args.role}: {args.desc_path} has {', '.join(characters)}")
        callers = access(args, problems)
    for warning in long_profiles(characters, model.tokenizer, model.config.model_max_length) if model else ():
        print(f"warning: {args.desc_path}: {warning}", file=sys.stderr)
    return device, characters, callers


# ---------------------------------------------------------------- what is on the page


class Page:
    """The components, one set for all visitors, and what they do.

    A listener is given values as a dict {component: value}, which a Visit opens, and returns new ones as such a dict.
    """

    def __init__(self, speaker: Speaker | Server, characters: dict[str, dict]):
        self.speaker, self.characters, self.persona = speaker, characters, persona
        self.greeted = not speaker.stand_in  # it has learnt single questions only: words before them would confuse it
        self.busy: set[str] = set()  # sessions for which an answer is due, or being written

    def blocks(self) -> gr.Blocks:
        with gr.Blocks(title="Baichuan2", fill_height=True, fill_width=True) as blocks:
            # What the browser keeps. The secret hides nothing: it is fixed, so that all can be read after a restart.
            self.chats, self.growing, self.personas, self.chosen = (
                gr.BrowserState(unset, storage_key=f"role-play-2-{name}", secret="role-play")
                for name, unset in {"chats": chats.NOTHING, "growing": {}, "personas": {}, "settings": []}.items()
            )
            self.todo = gr.State()  # changes when an answer is due
            self.recolour = gr.State()  # changes when the words of another answer are to be coloured

            with gr.Sidebar(width=300, open=False, elem_id="roles"):
                gr.HTML(I18N("roles"), elem_classes="title")
                self.cards = gr.Dataset(components=["html"], samples=[[""]], type="index", layout="gallery",
                                        samples_per_page=1000, show_label=False, elem_id="cards")  # fmt: skip
                with gr.Accordion(I18N("new_role"), open=False) as self.form:
                    self.name = gr.Textbox(label=I18N("role"), max_length=MAX_NAME)
                    self.about = gr.Textbox(label=I18N("description"), lines=4, max_length=MAX_DESCRIPTION)
                    add = gr.Button(I18N("add"), variant="primary")

            with gr.Sidebar(width=320, position="right", open=False, elem_id="settings"):
                gr.HTML(I18N("settings"), elem_classes="title")
                self.description = gr.Textbox(label=I18N("description"), lines=4, max_lines=12,
                                              max_length=MAX_DESCRIPTION, elem_id="description")  # fmt: skip
                restore = gr.Button(I18N("restore"), size="sm", elem_id="restore")
                remove = gr.Button(I18N("remove"), size="sm", variant="stop", elem_id="remove")
                with gr.Column(visible=self.speaker.adapter is not None):
                    self.compare = gr.Checkbox(label=I18N("compare"))
                    self.colour = gr.Checkbox(label=I18N("colour"))
                    self.strength = gr.Slider(0, 1.5, 1, step=0.05, label=I18N("strength"))
                with gr.Accordion(I18N("sampling"), open=False):
                    config = self.speaker.own_settings
                    self.settings = {"do_sample": gr.Checkbox(bool(config.do_sample), label=I18N("do_sample"))}
                    for name, (low, high, step, unset) in SETTINGS.items():
                        value = getattr(config, name)
                        value = unset if value is None else min(max(value, low), high)
                        self.settings[name] = gr.Slider(low, high, value, step=step, label=I18N(name))
                    self.settings["seed"] = gr.Number(-1, label=I18N("seed"), precision=0, minimum=-1)
                with gr.Accordion(I18N("data"), open=False):
                    gr.HTML(I18N("kept"))
                    download = gr.Button(I18N("download"), elem_classes="idle")
                    delete, clear = (gr.Button(I18N(name), variant="stop") for name in ("delete", "clear"))

            # What comes and goes is hidden by page.css: gradio's `visible`, changed twice at once, keeps the first of both.
            with gr.Column(elem_id="main"):
                gr.HTML('<p role="alert"></p>', elem_id="notice")
                with gr.Row(elem_id="top"):
                    self.who = gr.HTML(elem_id="who")
                    self.number = gr.Dropdown(label=I18N("chats"), show_label=False, container=False, filterable=False,
                                              elem_id="number")  # fmt: skip
                    fresh = gr.Button(I18N("fresh"), size="sm", elem_id="fresh")
                exact = {"render_markdown": False, "latex_delimiters": [], "allow_tags": False, "layout": "bubble",
                         "group_consecutive_messages": False, "buttons": ["copy"], "autoscroll": False}  # fmt: skip
                self.log = gr.Chatbot(show_label=False, editable="all", elem_id="log", **exact)
                self.words = gr.HighlightedText(color_map=COLOURS, show_legend=True,
                                                show_inline_category=False, elem_id="words")  # fmt: skip
                gr.HTML(I18N("stand_in"), visible=self.speaker.stand_in, elem_id="stand_in")
                self.question = gr.Textbox(label=I18N("ask_label"), show_label=False, max_lines=8, submit_btn="→",
                                           autofocus=True, elem_id="question")  # fmt: skip
            self.lines = gr.Textbox(visible="hidden")  # what is downloaded
            self.switches = [self.compare, self.colour, self.strength, *self.settings.values()]
            # gradio passes a set in the order in which its components were made: page.js takes the first four apart.
            given = {self.chats, self.growing, self.personas, self.cards, self.description, self.number}
            given |= {self.question, self.name, self.about, *self.switches}
            shown = {*given, self.todo, self.recolour, self.who, self.log, self.words, self.lines, self.form}
            # Values as they come: gradio would refuse a choice that the server offered before it was restarted.
            private = {"api_visibility": "private", "preprocess": False}
            hidden = {"show_progress": "hidden", **private}
            # One model answers one question at a time; an engine as many as come.
            limit = 1 if isinstance(self.speaker, Speaker) else None
            model = {"concurrency_id": "model", "concurrency_limit": limit, **private}

            settled = blocks.load(None, self.chosen, self.switches, js="(chosen) => chosen")
            load = settled.then(self.listener(Visit.load), given, shown, js="page.start", api_name="load", **hidden)
            load.then(None, js="page.loaded")
            for trigger, step in {
                self.question.submit: self.ask, self.log.example_select: self.ask, self.log.option_select: Visit.option,
                self.log.retry: self.begin, self.log.undo: Visit.undo, self.log.edit: Visit.edit,
            }.items():  # fmt: skip
                trigger(self.listener(step), given, shown, **hidden)
            grows = [self.growing, self.log]
            answered = self.todo.change(self.stream, given, grows, show_progress_on=self.log, **model)
            answered.then(self.end, given, shown, **hidden)
            coloured = [self.recolour.change, self.colour.change, self.strength.change]
            last = {"show_progress": "hidden", "trigger_mode": "always_last"}
            gr.on(coloured, self.colour_words, given, self.words, **last, **model)
            self.question.stop(None, cancels=[answered])

            # Whoever turns to another conversation stops the answer, and waits until no word of it comes any more.
            sure = {
                key: button.click(None, js=f"page.sure('{key}')").success
                for key, button in {"delete_sure": delete, "clear_sure": clear, "remove_sure": remove}.items()
            }
            for trigger, step in {
                self.cards.click: Visit.choose_role, add.click: Visit.add_role, fresh.click: Visit.fresh,
                self.number.input: Visit.choose_chat, restore.click: Visit.restore,
                sure["delete_sure"]: Visit.delete, sure["clear_sure"]: Visit.clear, sure["remove_sure"]: Visit.remove,
            }.items():  # fmt: skip
                stopped = trigger(None, cancels=[answered]).then(self.wait, **hidden)
                chosen = stopped.then(self.listener(step), given, shown, js="page.named", **hidden)
                chosen.then(None, js="page.chosen")

            # What the browser does alone, and the download.
            stored = [self.chats, self.growing, self.personas]
            gr.on([self.chats.change, self.personas.change], None, stored, js="page.stored")
            described = [self.description, self.chats, self.personas]
            self.description.blur(None, described, self.personas, js="page.described")
            self.compare.change(None, self.compare, js="page.compared")
            gr.on([switch.change for switch in self.switches], None, self.switches, self.chosen, js="(...all) => [all]")
            written = download.click(self.listener(Visit.download), given, shown, **hidden)
            written.then(None, self.lines, js="page.download")
        return blocks.queue(max_size=100, default_concurrency_limit=None, api_open=False)  # max_size: events that wait

    # ---------------------------------------------------------------- what it does: an answer

    def listener(self, step):
        """For gradio: do a step with a Visit, then show the conversation as it stands, and what else the step returns."""

        def listen(values: dict, request: gr.Request, event: gr.EventData) -> dict:
            visit = Visit(self, values, request, event)
            if request.session_hash in self.busy:  # the view is what the answer is being written into
                warn(visit.say("busy"))
                return gr.skip()
            try:
                changes = step(visit) or {}
            except Refusal as refusal:
                warn(str(refusal))
                draft, changes = visit.draft, {}
                visit = Visit(self, values, request)
                visit.draft = draft
            return visit.view() | changes

        return listen

    def ask(self, visit: Visit) -> dict:
        """What was typed, or a question to begin with."""
        chosen = visit.data.get("value")
        chosen = chosen["text"] if isinstance(chosen, dict) else chosen
        chats.add_turn(visit.chat, chosen or visit.values[self.question])
        shown = self.begin(visit)
        if not chosen:
            shown[self.question] = gr.Textbox("", submit_btn=False, stop_btn=visit.say("stop"))
        return shown

    def begin(self, visit: Visit, begun: str = "") -> dict:
        """Have the last question answered, from where its answer has begun. Raises: Refusal."""
        turn = visit.chat["turns"][-1]
        visit.refuse_blank("question", turn["question"])
        try:
            longest = visit.settings()["max_new_tokens"]
            _, _, forgotten = self.speaker.fit(visit.prompt(), longest, begun)
        except TooLong as error:
            raise Refusal(visit.say("too_long", needed=error.needed, context=error.context)) from None
        if forgotten:
            gr.Info(visit.say("forgotten"))
        if not begun:
            chats.add_version(turn)
        self.busy.add(visit.request.session_hash)
        button = gr.Textbox(submit_btn=False, stop_btn=visit.say("stop"))
        shown = {self.growing: chats.growing(visit.storage), self.todo: time.time(), self.recolour: gr.skip()}
        return shown | {self.question: button}

    def colour_words(self, values: dict, request: gr.Request) -> dict:
        return gr.skip() if request.session_hash in self.busy else Visit(self, values, request).coloured()

    def stream(self, values: dict, request: gr.Request):
        """The answer as it grows, in the bubble and in what the browser keeps."""
        if request.session_hash not in self.busy:  # it was stopped while it waited
            yield (gr.skip(),) * 2
            return
        visit = Visit(self, values, request, writing=True)
        version = chats.shown_version(visit.chat["turns"][-1])
        settings, begun, due = visit.settings(), version["text"], 0.0
        yield chats.growing(visit.storage), visit.bubbles()
        with visit.failures():
            for whose in ["text", "base"] if visit.compare else ["text"]:
                how = {"begun": begun, "strength": values[self.strength]} if whose == "text" else {"strength": 0.0}
                stream = self.speaker.stream(visit.prompt(whose), settings, **how)
                with closing(stream):  # also where the visitor stops it or leaves: that frees the model
                    for version[whose], state in stream:
                        version["state"] = state if whose == "text" else version["state"]
                        if time.monotonic() >= due or state != "stopped":
                            yield chats.growing(visit.storage), visit.bubbles()
                            due = time.monotonic() + 0.05  # seconds between two updates
            if not version["text"].strip():
                warn(visit.say("silent", role=visit.role))

    def end(self, values: dict, request: gr.Request) -> dict:
        """Keep what was written; a question without a word of an answer goes back beside what was typed meanwhile."""
        if request.session_hash not in self.busy:
            return gr.skip()
        self.busy.discard(request.session_hash)
        return Visit(self, values, request).view()

    async def wait(self, request: gr.Request):
        """Until an answer that was stopped has ended."""
        while request.session_hash in self.busy:
            await asyncio.sleep(0.05)


# ---------------------------------------------------------------- how it is served


@entry_point
def main(argv=None):
    args = parse_args(argv)
    device, characters, (callers, urls) = read_inputs(args)
    model, source = (args.model_path, args.adapter_path, device, args.load_in_4bit), args.engine or args.model_path
    os.environ["no_proxy"] = NO_PROXY  # which a client keeps as it finds it
    speaker = Server(args.engine).check() if args.engine else Speaker.load(*model)
    if args.ask is not None:
        role = args.role or next(iter(characters))
        messages = conversation(persona(role, characters[role]["description"]), args.ask)
        longest = speaker.own_settings.max_new_tokens or SETTINGS["max_new_tokens"][-1]
        stream = speaker.stream(messages, {"do_sample": False, "seed": -1, "max_new_tokens": longest})
        with said_if_slow(f"reading the persona of {role} and the question"):
            shown, _ = next(stream)
        print(shown, end="", flush=True)
        for text, _ in stream:
            print(text[len(shown) :], end="", flush=True)
            shown = text
        return print()
    for role, questions in example_questions(args.desc_path, characters).items():
        characters[role]["questions"] = characters[role]["questions"] or questions
    if callers["auth"] is None and callers["server_name"] not in LOCAL:
        print(f"warning: whoever reaches {args.server_name} can use the page; --auth_file lets only some in")
    blocks = Page(speaker, characters).blocks()
    os.environ["no_proxy"] = "*"
    _, url, _ = blocks.launch(
        state_session_capacity=100,  # visitors whose values it holds: as many as may wait in the queue
        **callers, quiet=True, max_threads=200, prevent_thread_lock=True, i18n=I18N, theme=THEME, css_paths=CSS,
        favicon_path=CSS.with_name("icon.svg"), head=ICON, auth_message=ICON + SIGN_IN,
        js=JS, footer_links=[], max_file_size=0, ssr_mode=False, run_history=False, enable_monitoring=False, share=False,
    )  # fmt: skip
    print(f"{source} answers on {', '.join(urls) or url.rstrip('/')}", flush=True)
    blocks.block_thread()


if __name__ == "__main__":
    main()
