"""Chat with a role in the browser.

    python3 web_demo.py --device 0 --model_path "output_dir/epoch-1-step-1002-merge" --desc_path "data/profiles-zh_desc.json"
    python3 web_demo.py --model_path Baichuan2-7B-Chat/ --adapter_path output_dir/epoch-1-step-1002    # before and after
    python3 web_demo.py --ask "你是谁？" --role 李白        # one greedy answer on the terminal, and no page

In the order of reading: the texts of the page, the arguments, the model that answers, what the page accepts, the page
itself, and the gate before it.
"""

import json
import os
import re
import socket
import sys
import threading
import time
import unicodedata
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import closing, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read by gradio at import: the page calls nobody

import gradio as gr
import torch
from peft import PeftModel
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from transformers import DynamicCache
from transformers.utils import logging

from baichuan.generation_utils import messages_to_ids
from data_helper import persona, read_profiles, read_rows, without_address
from utils import ArgumentParser, UserError, entry_point, load_model, load_tokenizer, model_directory_problems

MAX_NAME, MAX_DESCRIPTION, MAX_QUESTION, MAX_ROUNDS = 40, 2000, 8000, 100  # characters, and rounds of a conversation
MAX_BODY = 4 << 20  # bytes of a request; a pasted megabyte still gets its answer in words
SHORTEST_REPLY = 16  # tokens; a question that leaves less room than this is too long
CACHED_TOKENS = 4096  # of personas' keys and values kept, 2 GiB at 7B in bf16
PERIOD = 0.05  # seconds between two updates of a growing answer

# ---------------------------------------------------------------- the texts of the page

TEXTS = {  # English, Chinese; the browser's language decides
    "title": ("Role-play chat", "角色对话"),
    "stand_in": (
        "This is a small stand-in model: it knows only the sample's sentences.",
        "这是一个小小的替身模型，只会样例数据里的话。",
    ),
    "role": ("Role: choose one, or type a new name", "角色：选一个，或输入新名字"),
    "description": ("Who it is", "人物简介"),
    "fresh": ("New chat", "新对话"),
    "chat": ("Conversation", "对话"),
    "tuned": ("Fine-tuned", "微调后"),
    "base": ("Base model", "微调前"),
    "greeting": ("### Ask me anything", "### 想聊点什么？"),
    "question": ("Ask, and press Enter (Shift+Enter for a new line)", "说点什么，按回车发送（Shift+回车换行）"),
    "settings": ("Settings of the next answer", "下一次回答的设置"),
    "max_new_tokens": ("Longest reply, in tokens", "回答最长（token）"),
    "do_sample": ("Sampling (off: always the likeliest token)", "随机采样（关：总取最可能的词）"),
    "temperature": ("Temperature", "温度 temperature"),
    "top_p": ("Top-p", "核采样 top-p"),
    "top_k": ("Top-k (0: off)", "top-k（0 为不限）"),
    "repetition_penalty": ("Repetition penalty (1: off)", "重复惩罚（1 为不罚）"),
    "seed": ("Seed (empty: random)", "随机种子（留空则每次不同）"),
    "compare": ("Show the base model's answer beside it", "并排显示微调前的回答"),
    "download": ("Download as training data", "下载为训练数据"),
    "new_role": ("A new conversation, since the role has changed.", "角色换了，对话从头开始。"),
    "cut": (
        "Only {room} of {wanted} tokens are left for the reply; it is cut there.",
        "上下文只剩 {room} 个 token（要求 {wanted} 个），回答到此为止。",
    ),
    "forgotten": (
        "The conversation no longer fits: the first {count} rounds are not read any more.",
        "对话太长：最早的 {count} 轮不再读入。",
    ),
    "greedy": (
        "Sampling is off: the same question gets the same answer.",
        "随机采样关着：同样的问题会得到同样的回答。",
    ),
    "refused": ("That did not work", "没有成功"),
    "not_text": ("{what}: text is expected.", "{what}：应为文字。"),
    "blank": ("{what}: please write something.", "{what}：请写点什么。"),
    "too_many": (
        "{what}: {count:,} characters; at most {most:,} are possible.",
        "{what}：共 {count:,} 个字，最多 {most:,} 个。",
    ),
    "control": ("{what}: holds a control character or half a character.", "{what}：含有控制字符或残缺字符。"),
    "not_number": (
        "{what}: a number from {low} to {high} is expected.",
        "{what}：应为 {low} 到 {high} 之间的数。",
    ),
    "not_switch": ("{what}: true or false is expected.", "{what}：应为 true 或 false。"),
    "too_long": (
        "Persona and question have {needed:,} tokens and leave no room for a reply in the model's {context:,}.",
        "简介和问题共 {needed:,} 个 token，模型上下文只有 {context:,} 个，没有余地回答。",
    ),
    "too_old": (
        "This conversation has {most} rounds, which is the limit: start a new one.",
        "这段对话已有 {most} 轮，到了上限：请开始新对话。",
    ),
    "busy": ("The last answer is still being written: stop it first.", "上一个回答还没写完：请先停止。"),
    "no_round": ("There is no such message in this conversation.", "这段对话里没有这条消息。"),
    "memory": (
        "The model ran out of memory: shorten the conversation or the reply.",
        "显存（内存）不足：请缩短对话或回答长度。",
    ),
    "no_path": ("There is nothing here.", "这里什么也没有。"),
    "no_api": ("Not a request of the page.", "不是本页面发出的请求。"),
}


def say(request, key: str, **values) -> str:
    """A text of TEXTS in the language that the browser asks for."""
    chinese = request.headers.get("accept-language", "").lower().startswith("zh")
    return TEXTS[key][chinese].format(**values)


# ---------------------------------------------------------------- arguments


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_path", default="output_dir/epoch-1-step-1002-merge", help="directory of a whole model")
    parser.add_argument("--adapter_path", help="directory of a PEFT adapter over --model_path, served without merging")
    parser.add_argument("--desc_path", default="data/profiles-zh_desc.json", help="JSON file {role: description}")
    parser.add_argument("--device", default="auto", help="a GPU's number; cpu or -1; auto: GPU 0 where there is one")
    parser.add_argument("--server_name", default="127.0.0.1", help="address to listen on; 0.0.0.0 opens it to others")
    parser.add_argument("--port", type=int, default=9090, help="TCP port of the page")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="what to sign in with; default: nothing")
    parser.add_argument("--ask", metavar="QUESTION", help="print one greedy answer instead of serving the page")
    parser.add_argument("--role", help="the role that --ask asks; default: the first of --desc_path")
    return parser.parse_args(argv)


def check(args) -> tuple[str, dict[str, str]]:
    """The device's name and the roles' descriptions. Raises: UserError with all that is wrong, before any slow work."""
    problems = model_directory_problems(args.model_path)
    if args.adapter_path and not (Path(args.adapter_path) / "adapter_config.json").is_file():
        problems.append(f"{args.adapter_path}: is no adapter, adapter_config.json is missing; train.py writes one")
    profiles = {}
    try:
        profiles = read_profiles(Path(args.desc_path))
        if args.role is not None and args.role not in profiles:
            problems.append(f"--role {args.role}: {args.desc_path} has only {', '.join(profiles)}")
    except UserError as error:
        problems += error.problems
    gpus, device = torch.cuda.device_count(), args.device
    if device == "auto":
        device = "0" if gpus else "cpu"
    if device in ("cpu", "-1"):
        device = "cpu"
    elif not device.isdecimal():
        problems.append(f"--device {device}: must be auto, cpu, or a GPU's number")
    elif int(device) >= gpus:
        problems.append(f"--device {device}: torch sees {gpus} CUDA GPUs here; give --device cpu or auto")
    if args.auth is not None and not re.fullmatch(r"[^:]+:.+", args.auth):
        problems.append("--auth: must be USER:PASSWORD, neither of them empty")
    if args.ask is None:
        problems += port_problems(args.server_name, args.port)
    elif not args.ask.strip():
        problems.append("--ask: the question is blank")
    if problems:
        raise UserError(*problems)
    return (device if device == "cpu" else f"cuda:{int(device)}"), profiles


def port_problems(server_name: str, port: int) -> list[str]:
    try:
        family, _, _, _, address = socket.getaddrinfo(server_name, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        return [f"{server_name}:{port}: cannot listen there ({reason}); choose another --port or --server_name"]
    return []


def example_questions(desc_path: str, roles, count: int = 4) -> dict[str, list[str]]:
    """A few short questions a role, out of the training file beside the descriptions where there is one."""
    try:
        rows = read_rows(Path(desc_path).parent / "rolebench-zh_role_specific_train.jsonl", None)
    except UserError:  # the page can do without
        rows = []
    examples = {role: [] for role in roles}
    for row in rows:
        question = without_address(row["question"], row["role"])
        if len(question) <= 30 and len(examples.get(row["role"], range(count))) < count:
            examples[row["role"]].append(question)
    return examples


# ---------------------------------------------------------------- the model


class TooLong(Exception):
    """Persona and question leave no room for a reply. Attributes: needed, context, in tokens."""

    def __init__(self, needed: int, context: int):
        super().__init__(f"persona and question have {needed:,} tokens and leave no room for a reply in {context:,}")
        self.needed, self.context = needed, context


class Speaker:
    """A model that answers one question at a time, and reads the persona of a role only once."""

    def __init__(self, model, tokenizer, adapter: PeftModel | None = None):
        self.model, self.tokenizer, self.adapter = model, tokenizer, adapter
        self.context = model.config.model_max_length
        self.turn = threading.Lock()
        self.prefixes = OrderedDict()  # (persona's ids, of the base?) → keys and values, least recently used first

    def fit(self, messages: list[dict], max_new_tokens: int) -> tuple[list[int], int]:
        """Ids of the prompt and tokens left for the reply. messages: the persona's, then the conversation's.

        The reply gives way to the question, the oldest rounds give way to both.
        """
        config = self.model.generation_config
        needed = len(messages_to_ids(self.tokenizer, [messages[0], messages[-1]], config))
        room = min(max_new_tokens, self.context - needed)
        if room < min(max_new_tokens, SHORTEST_REPLY):
            raise TooLong(needed, self.context)
        return messages_to_ids(self.tokenizer, messages, config, self.context - room), room

    def answer(self, messages: list[dict], settings: dict, base: bool = False) -> Iterator[str]:
        """Yield the answer so far. Closing the iterator stops the model and lets the next question in.

        Args:
            settings: fields of GenerationConfig, and `seed`, None for a random one.
            base: answer as the model did before fine-tuning; needs the adapter.
        Raises:
            TooLong: the question does not fit. MemoryError: the device's memory does not suffice.
        """
        ids, room = self.fit(messages, settings["max_new_tokens"])
        config = deepcopy(self.model.generation_config)
        config.update(**{name: value for name, value in settings.items() if name != "seed"} | {"max_new_tokens": room})
        if not config.do_sample:
            config.update(temperature=None, top_p=None, top_k=None)  # greedy has no use for them
        persona_ids = self.tokenizer.text_to_ids(messages[0]["content"])
        prompt = torch.tensor([ids], device=self.model.device)
        with self.turn, self.adapter.disable_adapter() if base else nullcontext():
            torch.seed() if settings["seed"] is None else torch.manual_seed(settings["seed"])
            try:
                cache = self.prefix(persona_ids, base)
                yield from self.model.stream_answer(self.tokenizer, prompt, config, past_key_values=cache)
            except RuntimeError as error:  # torch.OutOfMemoryError on a GPU; on the CPU only its text tells
                if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                    raise
                self.prefixes.clear()
                torch.cuda.empty_cache()
                raise MemoryError(str(error)) from None

    @torch.no_grad()
    def prefix(self, ids: list[int], base: bool) -> DynamicCache:
        """Keys and values of a persona, computed on its first use: attention being causal, nothing later changes them."""
        key = (tuple(ids), base)
        if key not in self.prefixes:
            cache = DynamicCache(config=self.model.config)
            self.model.model(input_ids=torch.tensor([ids], device=self.model.device), past_key_values=cache)
            self.prefixes[key] = cache
        self.prefixes.move_to_end(key)
        while len(self.prefixes) > 1 and sum(len(ids) for ids, _ in self.prefixes) > CACHED_TOKENS:
            self.prefixes.popitem(last=False)
        return deepcopy(self.prefixes[key])  # generate() appends to it


def load_speaker(args, device: str) -> Speaker:
    """Weights keep the checkpoint's dtype: bf16 halves the 30 GB that 7B has in float32. float16 is for GPUs alone."""
    tokenizer, generation_config = load_tokenizer(args.model_path)
    model = load_model(args.model_path, dtype="auto")
    model.generation_config = generation_config
    if device == "cpu" and model.dtype == torch.float16:
        model = model.float()
    adapter = None
    if args.adapter_path:
        try:
            adapter = PeftModel.from_pretrained(model, args.adapter_path)  # puts its layers into `model` itself
        except Exception as error:  # a file that is damaged, or made for a model of another shape
            raise UserError(f"{args.adapter_path}: does not fit {args.model_path}: {error}") from error
    try:
        return Speaker(model.to(device).eval(), tokenizer, adapter)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{device}: has too little free memory for {args.model_path}; free some or give --device cpu"
        ) from error


# ---------------------------------------------------------------- what the page accepts

SETTINGS = {  # type, lowest, highest, step of a slider; what a browser sends is checked against it again
    "max_new_tokens": (int, 1, 2048, 1),
    "temperature": (float, 0.05, 2.0, 0.05),
    "top_p": (float, 0.05, 1.0, 0.05),
    "top_k": (int, 0, 100, 1),
    "repetition_penalty": (float, 1.0, 2.0, 0.05),
    "seed": (int, 0, 2**32 - 1, 1),
}


class Refusal(gr.Error):
    """A message for the person at the browser instead of an answer."""

    def __init__(self, request, key: str, **values):
        if "what" in values:  # name the field as the page does
            values["what"] = say(request, values["what"])
        super().__init__(say(request, key, **values), title=say(request, "refused"), print_exception=False)


def checked_text(request, what: str, text, most: int) -> str:
    if not isinstance(text, str):
        raise Refusal(request, "not_text", what=what)
    if len(text) > most:
        raise Refusal(request, "too_many", what=what, count=len(text), most=most)
    text = text.replace("\r\n", "\n").replace(JOINER, "")
    if any(unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t" for character in text):
        raise Refusal(request, "control", what=what)
    if not text.strip():
        raise Refusal(request, "blank", what=what)
    return text


def checked_switch(request, what: str, value) -> bool:
    if not isinstance(value, bool):
        raise Refusal(request, "not_switch", what=what)
    return value


def checked_settings(request, do_sample, *values) -> dict:
    """`do_sample` and the values in the order of SETTINGS, as fields of GenerationConfig and `seed`."""
    settings = {"do_sample": checked_switch(request, "do_sample", do_sample)}
    for (name, (kind, low, high, _)), value in zip(SETTINGS.items(), values):
        if name == "seed" and value is None:
            settings[name] = None
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not low <= value <= high or kind(value) != value:
            raise Refusal(request, "not_number", what=name, low=low, high=high)
        settings[name] = kind(value)
    return settings


@dataclass
class Conversation:
    """What one browser tab has said so far; it lives in the server's memory and nowhere else."""

    # Each {"role", "system", "prompt", "response", "base": the base model's response, "settings", "compare"}.
    rounds: list[dict] = field(default_factory=list)
    answering: bool = False

    def messages(self, column: str) -> list[dict]:
        """What the model reads: the last round's persona and question after the rounds that have an answer.

        column: "response" or "base". The base model continues its own conversation, as far as it has one.
        """
        messages = [{"role": "system", "content": self.rounds[-1]["system"]}]
        for past in self.rounds[:-1]:
            messages += [{"role": "user", "content": past["prompt"]}]
            messages += [{"role": "assistant", "content": past[column] or past["response"]}]
        return [*messages, {"role": "user", "content": self.rounds[-1]["prompt"]}]

    def bubbles(self, column: str) -> list[dict]:
        """What gr.Chatbot shows."""
        shown = []
        for round in self.rounds:
            for role, text in (("user", round["prompt"]), ("assistant", round[column])):
                if text:
                    shown.append({"role": role, "content": [{"type": "text", "text": literal(text)}]})
        return shown


JOINER = "\u2060"  # takes no space and breaks no line


def literal(text: str) -> str:
    """Text that a browser shows as it is: gr.Chatbot would take `<b>` for bold type, and load `<img>` from anywhere."""
    return re.sub(r"[<&](?=[\w/!?#])", rf"\g<0>{JOINER}", text)


# ---------------------------------------------------------------- the page

CSS = """
#bar { align-items: end } #bar button { min-width: 7em; flex-grow: 0 }
#note { min-height: 1.5em; font-size: .9em; opacity: .8 }
.sidebar { padding-top: 1em }
"""
# An Enter that ends the choice of an input method does not send; on a phone the sidebar begins closed.
SCRIPT = """() => {
  window.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.isComposing || event.keyCode === 229)) event.stopImmediatePropagation();
  }, true);
  if (window.innerWidth < 768) document.querySelector(".sidebar .toggle-button")?.click();
}"""
SAVE = """(lines) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines], {type: "application/jsonl"}));
  link.download = "conversation.jsonl";
  link.click();
  URL.revokeObjectURL(link.href);
}"""


class Page:
    """What happens at each event of the page. All of it acts on the Conversation of one browser tab."""

    def __init__(self, speaker: Speaker, profiles: dict[str, str], examples: dict[str, list[str]]):
        self.speaker, self.profiles, self.examples = speaker, profiles, examples

    def ask(self, request: gr.Request, conversation, question, *form):
        """A new question at the end. `form`: role, description, compare, sampling and the values of SETTINGS."""
        return self.put(request, conversation, len(conversation.rounds), question, form)

    def ask_example(self, request: gr.Request, event: gr.EventData, conversation, *form):
        example = self.field(event, "value")
        question = example.get("text") if isinstance(example, dict) else None
        return self.put(request, conversation, len(conversation.rounds), question, form)

    def retry(self, request: gr.Request, event: gr.EventData, conversation, *form):
        number = self.round_number(request, event, conversation)
        return self.put(request, conversation, number, conversation.rounds[number]["prompt"], form, again=True)

    def edit(self, request: gr.Request, event: gr.EventData, conversation, *form):
        number = self.round_number(request, event, conversation)
        return self.put(request, conversation, number, self.field(event, "value"), form)

    def put(self, request, conversation, number, question, form, again=False):
        """Check everything, then let `question` be round `number` and the last one; `answer` follows."""
        if conversation.answering:
            raise Refusal(request, "busy")
        role, description, compare, *settings = form
        role = checked_text(request, "role", role, MAX_NAME)
        description = checked_text(request, "description", description, MAX_DESCRIPTION)
        question = checked_text(request, "question", question, MAX_QUESTION)
        compare = checked_switch(request, "compare", compare) and self.speaker.adapter is not None
        settings = checked_settings(request, *settings)
        kept = [past for past in conversation.rounds[:number] if past["response"] and past["role"] == role]
        if len(kept) >= MAX_ROUNDS:
            raise Refusal(request, "too_old", most=MAX_ROUNDS)
        attempt = conversation.rounds[number]["attempt"] + 1 if again else 0
        this = {"role": role, "system": persona(role, description), "prompt": question, "response": "", "base": ""}
        asked = Conversation([*kept, this | {"settings": settings, "compare": compare, "attempt": attempt}], True)
        notes = self.notes(request, asked)
        conversation.rounds, conversation.answering = asked.rounds, True
        box = gr.Textbox(value="", submit_btn=False, stop_btn=True)
        return conversation, *self.columns(conversation), " ".join(notes), box

    def notes(self, request, conversation) -> list[str]:
        """What to tell the person about the answer to come. Raises: Refusal when the question does not fit."""
        last, messages = conversation.rounds[-1], conversation.messages("response")
        wanted = last["settings"]["max_new_tokens"]
        try:
            _, room = self.speaker.fit(messages, wanted)
        except TooLong as error:
            raise Refusal(request, "too_long", needed=error.needed, context=error.context) from None
        config = self.speaker.model.generation_config
        notes = [say(request, "cut", room=room, wanted=wanted)] if room < wanted else []
        count = 0  # oldest rounds that go, two messages each
        while len(messages_to_ids(self.speaker.tokenizer, [messages[0], *messages[1 + 2 * count :]], config)) > (
            self.speaker.context - room
        ):
            count += 1
        if count:
            notes.append(say(request, "forgotten", count=count))
        if last["attempt"] and not last["settings"]["do_sample"]:
            notes.append(say(request, "greedy"))
        return notes

    def answer(self, request: gr.Request, conversation):
        """Stream the answer of the fine-tuned model, then the base's if it was asked for."""
        if not conversation.answering or not conversation.rounds:
            return
        last = conversation.rounds[-1]
        settings = dict(last["settings"])
        if settings["seed"] is not None:
            settings["seed"] += last["attempt"]  # another attempt, another answer, and that too can be had again
        try:
            for column in ("response", "base")[: 1 + last["compare"]]:
                stream = self.speaker.answer(conversation.messages(column), settings, base=column == "base")
                for last[column] in paced(stream):
                    yield conversation, *self.columns(conversation)
        except (MemoryError, TooLong):
            raise Refusal(request, "memory") from None

    def done(self, conversation):
        conversation.answering = False
        return conversation, gr.Textbox(submit_btn=True, stop_btn=False)

    def undo(self, request: gr.Request, event: gr.EventData, conversation):
        """Take the last question back into the text box."""
        if conversation.answering:
            raise Refusal(request, "busy")
        number = self.round_number(request, event, conversation)
        question = conversation.rounds[number]["prompt"]
        conversation.rounds = conversation.rounds[:number]
        return conversation, *self.columns(conversation), "", gr.Textbox(value=question)

    def clear(self):
        return Conversation(), [], [], "", gr.Textbox(submit_btn=True, stop_btn=False)

    def change_role(self, request: gr.Request, conversation, role):
        role = checked_text(request, "role", role, MAX_NAME)
        note = say(request, "new_role") if conversation.rounds else ""
        fresh, _, base, _, box = self.clear()
        chat = gr.Chatbot(value=[], examples=[{"text": question} for question in self.examples.get(role, [])])
        return fresh, chat, base, note, box, self.profiles.get(role, "")

    def download(self, conversation) -> str:
        """JSON lines as train.py reads them: a line a round, each by itself, since a sample has no history."""
        keys = ("role", "system", "prompt", "response")
        rounds = [{key: round[key] for key in keys} for round in conversation.rounds if round["response"]]
        return "".join(json.dumps(round, ensure_ascii=False) + "\n" for round in rounds)

    def columns(self, conversation) -> tuple[list[dict], list[dict]]:
        return conversation.bubbles("response"), conversation.bubbles("base")

    def round_number(self, request, event, conversation) -> int:
        """The round of the bubble that an event is about; every round but the last has two bubbles."""
        index = self.field(event, "index")
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index // 2 < len(conversation.rounds):
            raise Refusal(request, "no_round")
        return index // 2

    def field(self, event: gr.EventData, name: str):
        try:
            return getattr(event, name)
        except (AttributeError, TypeError):  # the browser sent no such thing
            return None

    def build(self) -> tuple[gr.Blocks, gr.I18n]:
        """Components and what they call. Nothing is checked by gradio (`preprocess=False`): `put` does it, in words."""
        english, chinese = ({key: texts[number] for key, texts in TEXTS.items()} for number in (0, 1))
        text = gr.I18n(en=english, zh=chinese, **{"zh-CN": chinese, "zh-TW": chinese})
        tuned = self.speaker.adapter is not None
        first = next(iter(self.profiles))
        defaults = self.speaker.model.generation_config
        with gr.Blocks(title="Baichuan2 · 角色对话", fill_height=True, analytics_enabled=False) as demo:
            conversation = gr.State(Conversation())
            with gr.Sidebar(width=330):
                description = gr.Textbox(
                    self.profiles[first], label=text("description"), lines=5, max_lines=12, max_length=MAX_DESCRIPTION
                )
                compare = gr.Checkbox(False, label=text("compare"), visible=tuned)
                with gr.Accordion(text("settings"), open=True):
                    do_sample = gr.Checkbox(bool(defaults.do_sample), label=text("do_sample"))
                    settings = []
                    for name, (kind, low, high, step) in SETTINGS.items():
                        if name == "seed":
                            settings.append(gr.Number(None, label=text(name), placeholder="—", precision=0))
                            continue
                        value = getattr(defaults, name, None)
                        value = min(max(kind(high if value is None else value), low), high)
                        settings.append(gr.Slider(low, high, value, step=step, label=text(name)))
                download = gr.Button(text("download"), size="sm")
                lines = gr.Textbox(visible=False)
            with gr.Row(elem_id="bar"):
                role = gr.Dropdown(list(self.profiles), value=first, label=text("role"), allow_custom_value=True)
                fresh = gr.Button(text("fresh"))
            if getattr(self.speaker.model.config, "stand_in", None):
                gr.Markdown(text("stand_in"), elem_id="stand_in")
            looks = {"scale": 1, "render_markdown": False, "height": "55vh", "buttons": ["copy"]}
            with gr.Row(scale=1):
                chat = gr.Chatbot(
                    label=text("tuned" if tuned else "chat"),
                    placeholder=text("greeting"),
                    examples=[{"text": question} for question in self.examples[first]],
                    editable="user",
                    elem_id="chat",
                    **looks,
                )
                base_chat = gr.Chatbot(label=text("base"), visible=False, elem_id="base_chat", **looks)
            note = gr.Markdown(elem_id="note")
            question = gr.Textbox(
                show_label=False, placeholder=text("question"), submit_btn=True, max_lines=8, elem_id="question"
            )

            quick = {
                "preprocess": False,
                "show_progress": "hidden",
                "concurrency_limit": None,
                "api_visibility": "private",
            }
            form = [role, description, compare, do_sample, *settings]
            shown = [conversation, chat, base_chat, note, question]
            running = []
            for listen, fn, inputs in (
                (question.submit, self.ask, [conversation, question, *form]),
                (chat.example_select, self.ask_example, [conversation, *form]),
                (chat.retry, self.retry, [conversation, *form]),
                (chat.edit, self.edit, [conversation, *form]),
            ):
                put = listen(fn, inputs, shown, **quick)
                answer = put.success(
                    self.answer,
                    conversation,
                    [conversation, chat, base_chat],
                    concurrency_id="model",
                    concurrency_limit=1,  # in turn; the place in the queue shows on the note
                    show_progress_on=note,
                    api_visibility="private",
                )
                running.append(answer)
                answer.then(self.done, conversation, [conversation, question], **quick)
            question.stop(self.done, conversation, [conversation, question], cancels=running, **quick)
            chat.undo(self.undo, conversation, shown, **quick)
            for listen in (chat.clear, fresh.click):
                listen(self.clear, None, shown, cancels=running, **quick)
            role.input(self.change_role, [conversation, role], [*shown, description], cancels=running, **quick)
            compare.change(None, compare, base_chat, js="(on) => ({visible: on, __type__: 'update'})")
            download.click(self.download, conversation, lines, **quick).success(None, lines, None, js=SAVE)
        return demo, text


def paced(stream: Iterator[str]) -> Iterator[str]:
    """The stream's first text at once, later ones at most every PERIOD, and the last in any case."""
    with closing(stream):
        due, waiting = 0.0, None
        for text in stream:
            waiting = text
            if time.monotonic() >= due:
                yield text
                due, waiting = time.monotonic() + PERIOD, None
        if waiting is not None:
            yield waiting


# ---------------------------------------------------------------- the gate


class Gate:
    """Stands before gradio, and lets through what the page itself sends: no upload, no file, no proxy, no other API."""

    OPEN = re.compile(
        r"/|/(config|theme\.css|favicon\.ico|manifest\.json|login|logout|login_check)/?|/(static|assets|svelte)/.*"
        r"|/gradio_api/(queue/join|queue/data|cancel|reset|heartbeat/\w+|startup-events|login_check|token|app_id)/?"
    )
    # The browser loads nothing from, and sends nothing to, any other host, whatever an answer may contain.
    HEADERS = {
        "content-security-policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; base-uri 'self';"
        " form-action 'self'; frame-ancestors 'self'",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }

    def __init__(self, app, demo: gr.Blocks):
        self.app, self.demo = app, demo

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None

        async def send_with_headers(message):
            if message["type"] == "http.response.start":
                message["headers"] += [(name.encode(), value.encode()) for name, value in self.HEADERS.items()]
            await send(message)

        request, body = Request(scope, receive), bytearray()
        if not self.OPEN.fullmatch(request.url.path):
            return await self.refuse(request, 404, "no_path")(scope, receive, send_with_headers)
        if request.method not in ("GET", "HEAD"):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY:
                    refusal = self.refuse(request, 413, "too_many", what="question", count=MAX_BODY, most=MAX_QUESTION)
                    return await refusal(scope, receive, send_with_headers)
            if request.url.path.rstrip("/").endswith("/queue/join") and not self.is_of_the_page(body):
                return await self.refuse(request, 422, "no_api")(scope, receive, send_with_headers)
        pending = [{"type": "http.request", "body": bytes(body)}] if request.method not in ("GET", "HEAD") else []

        async def replay():
            return pending.pop() if pending else await receive()

        await self.app(scope, replay, send_with_headers)

    def is_of_the_page(self, body: bytearray) -> bool:
        """Is it a call of one of the page's functions, with as many values as it takes, and no file among them?"""
        try:
            call = json.loads(body)
            function = self.demo.fns[call["fn_index"]]
            values = call["data"]
        except (ValueError, TypeError, KeyError, RecursionError):
            return False
        plain = isinstance(values, list) and not any(isinstance(value, (dict, list)) for value in values)
        return plain and len(values) == len(function.inputs)

    def refuse(self, request, status: int, key: str, **values) -> JSONResponse:
        message = str(Refusal(request, key, **values).message)
        return JSONResponse({"error": message, "detail": message}, status)


@entry_point
def main(argv=None):
    args = parse_args(argv)
    device, profiles = check(args)
    logging.disable_progress_bar()
    speaker = load_speaker(args, device)
    if args.ask is not None:
        role = args.role or next(iter(profiles))
        system = {"role": "system", "content": persona(role, profiles[role])}
        greedy = {
            "do_sample": False,
            "seed": None,
            "max_new_tokens": speaker.model.generation_config.max_new_tokens or 256,
        }
        answer = ""
        for answer in speaker.answer([system, {"role": "user", "content": args.ask}], greedy):
            pass
        print(answer)
        return
    if args.auth is None and args.server_name not in ("127.0.0.1", "localhost", "::1"):
        print(
            f"warning: whoever reaches {args.server_name} can use this page; --auth USER:PASSWORD asks them to sign in"
        )
    demo, i18n = Page(speaker, profiles, example_questions(args.desc_path, profiles)).build()
    demo.queue(max_size=100).launch(
        server_name=args.server_name,
        server_port=args.port,
        auth=tuple(args.auth.split(":", 1)) if args.auth else None,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        state_session_capacity=1000,  # conversations in memory; the oldest goes first
        app_kwargs={
            "middleware": [Middleware(Gate, demo=demo)],
            "docs_url": None,
            "redoc_url": None,
            "openapi_url": None,
        },
        i18n=i18n,
        theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=CSS,
        js=SCRIPT,
    )
    print(f"{args.model_path} answers on {demo.local_url}", flush=True)
    demo.block_thread()


if __name__ == "__main__":
    sys.exit(main())
