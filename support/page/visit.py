"""One event of the page: what the visitor's browser keeps, opened; and the conversation as it is shown afterwards."""

import html
import time
from contextlib import contextmanager
from copy import deepcopy

import gradio as gr

from support.errors import UserError, first_line
from support.page import chats
from support.page.look import TEXTS, card, exactly, mark, portrait

SETTINGS = {  # lowest, highest, step, and what transformers takes where a model says nothing (the longest answer is ours)
    "max_new_tokens": (1, 2048, 1, 512),
    "temperature": (0.05, 2, 0.05, 1.0),
    "top_p": (0.05, 1, 0.05, 1.0),
    "top_k": (0, 100, 1, 50),
    "repetition_penalty": (1, 2, 0.05, 1.0),
}
NOBODY = {"description": "", "greeting": "", "questions": [], "portrait": ""}  # a role that the visitor has invented


class Refusal(Exception):
    """Why nothing happens, in the visitor's language."""


class Visit:
    """What a listener works with; `view` gives what it returns.

    Attributes: `values`, the values of the page's components; `data` of the event; `storage`, what the browser keeps
    (chats.py); `role` and its `chat`, which are shown; `personas`, {role: description} of those that the visitor has
    changed or invented; `draft`, what the composer is to hold where that changes.
    """

    def __init__(self, page, values: dict, request: gr.Request, event: gr.EventData | None = None, writing=False):
        self.page, self.values, self.request, self.writing = page, values, request, writing
        self.data = (event and event._data) or {}
        self.storage = deepcopy(values[page.chats])
        personas = values[page.personas].items()
        self.personas = {role: text for role, text in personas if text != self.description_of(role)}
        self.description = values[page.description]
        self.turned, self.draft = False, None
        tuned = page.speaker.adapter is not None  # else the boxes are hidden, and may be ticked from another time
        self.compare, self.colour = tuned and values[page.compare], tuned and values[page.colour]
        if lost := chats.settle(self.storage, values[page.growing], ended=not writing):
            self.draft = "\n".join(filter(None, [lost, values[page.question]]))  # beside what was typed meanwhile
        self.open(self.storage["role"])

    def open(self, role: str):
        """The role's conversation; the first role's where there is none of this name (any more)."""
        self.role = role if role in self.roles() else self.roles()[0]
        self.chat = chats.open_chat(self.storage, self.role, self.character(self.role)["greeting"])

    def turn_to(self, role: str):
        """Another role, or the same one otherwise described."""
        self.open(role)
        self.description, self.turned = self.personas.get(self.role, self.description_of(self.role)), True

    def character(self, role: str) -> dict:
        return self.page.characters.get(role, NOBODY)

    def description_of(self, role: str) -> str:
        """As the profiles have it; `personas` may have another."""
        return self.character(role)["description"]

    def roles(self) -> list[str]:
        """Those of the profiles, and those that the visitor has invented."""
        return list(dict.fromkeys([*self.page.characters, *self.personas, *self.storage["chats"]]))

    def say(self, key: str, **values) -> str:
        """A text of the page, in the browser's language where there is one."""
        language = self.request.headers.get("accept-language", "")[:2]
        return TEXTS.get(language, TEXTS["en"])[key].format(**values)

    def refuse_blank(self, what: str, text: str):
        if not text.strip():
            raise Refusal(self.say("blank", what=self.say(what)))

    def settings(self) -> dict:
        """What the next answer is drawn with, as a Speaker takes it."""
        settings = {"do_sample": True, "seed": -1} | {name: unset for name, (*_, unset) in SETTINGS.items()}
        for name, unset in settings.items():
            value = self.values[self.page.settings[name]]
            settings[name] = unset if value is None else type(unset)(value)  # the browser sends 1 for 1.0
        if settings["seed"] >= 0:  # another attempt, another answer
            settings["seed"] = (settings["seed"] + self.chat["turns"][-1]["shown"]) % 2**32
        return settings

    def prompt(self, whose: str = "text") -> list[dict]:
        """What the model reads before it answers the last question."""
        system = self.page.persona(self.role, self.description)
        return chats.prompt(self.chat, system, self.page.greeted, whose)

    @contextmanager
    def failures(self):
        """Tell the visitor in words what failed, and the log in a line."""
        try:
            yield
        except MemoryError:
            warn(self.say("memory"))
        except Exception as error:
            print(f"error: an answer failed: {type(error).__name__}: {first_line(error)}", flush=True)
            warn(first_line(error) if isinstance(error, UserError) else self.say("failed"))

    # ---------------------------------------------------------------- what one does with a conversation

    def load(self):
        """The page as it was left, with the role that this tab showed (page.js)."""
        if not self.chat["turns"] and not self.chat.get("edited"):
            self.chat["greeting"] = self.character(self.role)["greeting"]  # of the profile as it is today
        self.turn_to(self.role)

    def option(self) -> dict | None:
        """What is offered below the last message."""
        if not self.chat["turns"]:
            return self.page.ask(self)
        turn = self.chat["turns"][-1]
        if self.data["value"] == "continue":
            return self.page.begin(self, chats.shown_version(turn)["text"])
        turn["shown"] += 1 if self.data["value"] == "next" else -1

    def undo(self) -> dict:
        """Take the last question back. It may be asked otherwise, unless another one is typed already."""
        question = self.chat["turns"].pop()["question"]
        return {self.page.question: gr.Textbox(self.values[self.page.question] or question)}

    def edit(self) -> dict | None:
        """An edited answer is another answer; an edited question is asked in a conversation of its own."""
        text = html.unescape(self.data["value"])  # see `exactly`
        number, whose, _ = list(self.bubble_texts())[self.data["index"]]
        if whose == "question":
            self.chat = chats.add(self.storage, self.chat["greeting"], self.chat["turns"][:number])
            chats.add_turn(self.chat, text)
            self.draft = "\n".join(filter(None, [text.strip(), self.values[self.page.question]]))  # where it is refused
            changes = self.page.begin(self)
            self.draft = None
            return changes
        self.refuse_blank("answer", text)
        if whose == "greeting":
            self.chat |= {"greeting": text, "edited": True}
        elif whose == "text":
            turn = self.chat["turns"][number]
            chats.add_version(turn, text=text, base=chats.shown_version(turn)["base"], state="edited")

    def fresh(self):
        if self.chat["turns"] or self.chat.get("edited"):
            self.chat = chats.add(self.storage, self.character(self.role)["greeting"])

    def choose_chat(self):
        self.storage["shown"][self.role] = self.values[self.page.number]
        self.open(self.role)

    def choose_role(self):
        self.turn_to(self.values[self.page.cards])

    def add_role(self) -> dict:
        name, about = self.values[self.page.name].strip(), self.values[self.page.about]
        self.refuse_blank("role", name)
        if name in self.roles():
            raise Refusal(self.say("known"))
        self.refuse_blank("description", about)
        self.personas[name] = about
        self.turn_to(name)
        return {self.page.name: "", self.page.about: "", self.page.form: gr.Accordion(open=False)}

    def restore(self):
        self.personas.pop(self.role, None)
        self.turn_to(self.role)

    def remove(self):
        """A role that the visitor has invented, and what was said with it."""
        for by_role in (self.personas, self.storage["chats"], self.storage["shown"]):
            by_role.pop(self.role, None)
        self.turn_to("")

    def delete(self):
        chats.remove(self.storage)
        self.turn_to(self.role)

    def clear(self):
        self.storage = deepcopy(chats.NOTHING)
        self.turn_to("")

    def download(self) -> dict:
        lines = chats.samples(self.storage, self.page.persona(self.role, self.description), self.page.greeted)
        if not lines:
            warn(self.say("nothing"))
        return {self.page.lines: lines}

    # ---------------------------------------------------------------- what is shown

    def view(self) -> dict:
        """The conversation as it stands, while no answer is being written: new values of the page's components."""
        page, number, face = self.page, self.storage["shown"][self.role], self.face(self.role)
        titles = []
        for count, chat in enumerate(self.storage["chats"][self.role], start=1):
            titles.append(f"{count}. " + (chat["turns"][0]["question"][:200] if chat["turns"] else "…"))
        examples = [{"text": question} for question in self.character(self.role)["questions"]]
        composer = {"placeholder": self.say("ask", role=self.role), "submit_btn": self.say("send"), "stop_btn": False}
        if self.draft is not None:
            composer["value"] = self.draft
        shown = {
            page.chats: self.storage,
            page.growing: {},
            page.who: card(self.role, self.description, face, head="own" if self.role in page.characters else "invented"),
            page.number: gr.Dropdown([*zip(titles, range(len(titles)))], value=number),
            page.log: gr.Chatbot(self.bubbles(), avatar_images=(None, {"url": face, "path": ""}), examples=examples,
                                 placeholder=html.escape(self.say("begin", role=self.role))),
            page.words: [],
            page.question: gr.Textbox(**composer),
            page.recolour: time.time() if self.colour and self.chat["turns"] else gr.skip(),
        }  # fmt: skip
        if self.turned:
            cards = []
            for role in self.roles():
                line = self.character(role)["greeting"] or self.personas.get(role, self.description_of(role))
                cards.append([card(role, line, self.face(role), current=role == self.role)])
            shown[page.cards] = gr.Dataset(samples=cards)
            shown |= {page.personas: self.personas, page.description: self.description}
        return shown

    def coloured(self) -> dict:
        """The last answer, each word by how much likelier fine-tuning made it."""
        gains = []
        if self.chat["turns"] and self.colour:
            answer = chats.shown_version(self.chat["turns"][-1])["text"]
            with self.failures():
                gains = self.page.speaker.words(self.prompt(), answer, self.values[self.page.strength])
        label = self.say("words", sum=sum(gain for _, gain in gains))
        marks = [(word, mark(gain)) for word, gain in gains]
        return {self.page.words: gr.HighlightedText(marks, label=label)}

    def face(self, role: str) -> str:
        return self.character(role)["portrait"] or portrait(role)

    def bubble_texts(self):
        """Yield what the bubbles say, as (number of the turn, whose, text). whose: greeting, question, base or text."""
        if self.chat["greeting"]:
            yield -1, "greeting", self.chat["greeting"]
        for number, turn in enumerate(self.chat["turns"]):
            version, is_last = chats.shown_version(turn), turn is self.chat["turns"][-1]
            yield number, "question", turn["question"]
            is_due = is_last and self.compare and (self.writing or not version["text"])
            if version["base"] or is_due:
                yield number, "base", version["base"]
            yield number, "text", version["text"]

    def bubbles(self) -> list[dict]:
        """The messages of the Chatbot. The base model's answer stands before the tuned one's; page.css places the two."""
        messages = []
        for _, whose, text in self.bubble_texts():
            role = "user" if whose == "question" else "assistant"
            messages.append({"role": role, "content": exactly(text or "…")})  # …: no word of the answer yet
        if messages and not self.writing:
            messages[-1]["options"] = self.options()
        return messages

    def options(self) -> list[dict]:
        """What one may choose below the last message: a question to begin with, another answer, the rest of one."""
        if not self.chat["turns"]:
            return [{"value": question} for question in self.character(self.role)["questions"]]
        turn, options = self.chat["turns"][-1], []
        number, count = turn["shown"] + 1, len(turn["versions"])
        if number > 1:
            options.append({"value": "previous", "label": f"‹ {self.say('previous')} {number - 1}/{count}"})
        if number < count:
            options.append({"value": "next", "label": f"{self.say('next')} {number + 1}/{count} ›"})
        state = chats.shown_version(turn)["state"]
        if state in ("cut", "stopped"):
            options.append({"value": "continue", "label": f"{self.say('was_' + state)} {self.say('continue')}"})
        return options


def warn(words: str):
    gr.Warning(html.escape(words))
