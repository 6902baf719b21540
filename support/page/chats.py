"""What the browser keeps: plain dicts, as JSON text, and what the model and train.py read of them.

    kept   {"role": shown now, "chats": {role: [chat, …]}, "shown": {role: number of the chat}}
    chat   {"id", "greeting", "turns": [{"question", "versions": [{"text", "base", "state"}, …], "shown": number}]}

A version is one answer to the question: text, the base model's answer beside it, and its state: done, edited, cut, stopped.
"""

import json
import secrets


def new_chat(greeting: str, turns=()) -> dict:
    return {"id": secrets.token_hex(8), "greeting": greeting, "turns": list(turns)}


def read(text) -> dict:
    """What was kept, with every part of the kind that it should be; nothing, where it is something else."""
    try:
        kept = json.loads(text)
        chats = {str(role): [read_chat(chat) for chat in chats] for role, chats in kept["chats"].items() if chats}
        shown = {role: min(max(int(kept["shown"].get(role, 0)), 0), len(chats[role]) - 1) for role in chats}
        return {"role": str(kept["role"]), "chats": chats, "shown": shown}
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError):
        return {"role": "", "chats": {}, "shown": {}}


def read_chat(chat) -> dict:
    turns = []
    for turn in chat["turns"]:
        versions = [{name: str(version[name]) for name in ("text", "base", "state")} for version in turn["versions"]]
        shown = min(max(int(turn["shown"]), 0), max(len(versions) - 1, 0))
        turns.append({"question": str(turn["question"]), "versions": versions, "shown": shown})
    return {"id": str(chat["id"]), "greeting": str(chat["greeting"]), "turns": turns}


def read_texts(text) -> dict:
    """A JSON object, of texts; empty for anything else."""
    try:
        return {str(name): str(value) for name, value in json.loads(text).items()}
    except (TypeError, ValueError, AttributeError, RecursionError):
        return {}


def write(value) -> str:
    return json.dumps(value, ensure_ascii=False)


# ---------------------------------------------------------------- the conversation that is shown


def open_chat(kept: dict, role: str, greeting: str) -> dict:
    """The conversation with a role that is shown, a new one where there is none."""
    kept["role"] = role
    if not kept["chats"].get(role):
        add(kept, new_chat(greeting))
    return kept["chats"][role][kept["shown"][role]]


def add(kept: dict, chat: dict) -> dict:
    """Show another conversation with the role."""
    chats = kept["chats"].setdefault(kept["role"], [])
    chats.append(chat)
    kept["shown"][kept["role"]] = len(chats) - 1
    return chat


def remove(kept: dict):
    """Forget the conversation that is shown."""
    role = kept["role"]
    chats, number = kept["chats"][role], kept["shown"].pop(role)
    del chats[number]
    if chats:
        kept["shown"][role] = min(number, len(chats) - 1)
    else:
        del kept["chats"][role]


def answer_of(turn: dict) -> dict | None:
    """The answer that is shown, and read by the model."""
    return turn["versions"][turn["shown"]] if turn["versions"] else None


def add_turn(chat: dict, question: str):
    chat["turns"].append({"question": question, "versions": [], "shown": 0})


def add_version(turn: dict, text: str = "", base: str = "", state: str = "stopped") -> dict:
    turn["versions"].append({"text": text, "base": base, "state": state})
    turn["shown"] = len(turn["versions"]) - 1
    return turn["versions"][-1]


def turn_of_bubble(chat: dict, bubble: int) -> tuple[int, str]:
    """Which turn a bubble belongs to, counted from the top, and what it shows: greeting, question or text."""
    if chat["greeting"]:
        if bubble == 0:
            return 0, "greeting"
        bubble -= 1
    return bubble // 2, ("question", "text")[bubble % 2]


def settle(kept: dict, grown: dict, ended: bool = True) -> str:
    """Keep an answer as far as it is written. Returns a question that got no word, and is in no conversation any more.

    Args:
        grown: {"id" of the chat, "text", "base", "state"}; {} where no answer was being written.
        ended: an answer without a word goes away, and its question too, where it is the only one.
    """
    every = (chat for chats in kept["chats"].values() for chat in chats)
    chat = next((chat for chat in every if chat["id"] == grown.get("id")), None)
    turn = chat["turns"][-1] if chat and chat["turns"] else {}
    if not turn.get("versions"):
        return ""
    version = answer_of(turn)
    version |= {name: grown.get(name, value) for name, value in version.items()}
    if ended and not version["text"].strip():
        del turn["versions"][turn["shown"]]
        turn["shown"] = max(len(turn["versions"]) - 1, 0)
    return "" if turn["versions"] else chat["turns"].pop()["question"]


# ---------------------------------------------------------------- what is read of it


def said(chat: dict, count: int, greeted: bool, whose: str = "text") -> list[dict]:
    """The first `count` turns as messages. whose: whose answers, the tuned model's (text) or the base model's."""
    messages = [{"role": "assistant", "content": chat["greeting"]}] if greeted and chat["greeting"] else []
    for turn in chat["turns"][:count]:
        if (answer := answer_of(turn)) and answer["text"]:
            messages.append({"role": "user", "content": turn["question"]})
            messages.append({"role": "assistant", "content": answer[whose] or answer["text"]})
    return messages


def prompt(chat: dict, system: str, greeted: bool, whose: str = "text") -> list[dict]:
    """What the model reads before it answers the last question."""
    last = len(chat["turns"]) - 1
    question = {"role": "user", "content": chat["turns"][last]["question"]}
    return [{"role": "system", "content": system}, *said(chat, last, greeted, whose), question]


def samples(kept: dict, system: str, greeted: bool) -> str:
    """The conversations with a role as training data, JSON lines: each up to its last finished answer, then its others.

    An answer that was stopped or cut ends the sample before it, since it would be learnt as a whole one.
    """
    role, lines = kept["role"], {}
    common = {"role": role, "system": system}
    for chat in kept["chats"].get(role, []):
        longest, others = [], []
        for number, turn in enumerate(chat["turns"]):
            before = [*said(chat, number, greeted), {"role": "user", "content": turn["question"]}]
            for version in filter(finished, turn["versions"]):
                ending = [*before, {"role": "assistant", "content": version["text"]}]
                if version is answer_of(turn):
                    longest = [ending]
                else:
                    others.append(ending)
            if (answer := answer_of(turn)) and not finished(answer):
                break
        lines |= {write(common | {"messages": messages}): None for messages in longest + others}
    return "".join(f"{line}\n" for line in lines)


def finished(version: dict) -> bool:
    return version["state"] in ("done", "edited") and version["text"].strip() != ""
