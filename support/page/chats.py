"""What the browser keeps, as plain dicts, and what the model and train.py read of it.

    storage  {"role": shown now, "chats": {role: [chat, …]}, "shown": {role: number of the chat}}
    chat     {"greeting", "turns": [{"question", "versions": [{"text", "base", "state"}, …], "shown": number}]}

A chat whose greeting the visitor has changed is marked "edited": True, and keeps it.
A version is one answer to the question: text, the base model's answer beside it, and its state: done, edited, cut, stopped.
An answer that is being written is kept apart: {"role", "chat": its number, "question", "version"}.
"""

import json

NOTHING = {"role": "", "chats": {}, "shown": {}}
EMPTY_VERSION = {"text": "", "base": "", "state": "stopped"}


def open_chat(storage: dict, role: str, greeting: str) -> dict:
    """Show the conversation with a role, a new one where there is none."""
    storage["role"] = role
    if not storage["chats"].get(role):
        add(storage, greeting)
    return storage["chats"][role][storage["shown"][role]]


def add(storage: dict, greeting: str, turns=()) -> dict:
    """Show another conversation with the role."""
    chats = storage["chats"].setdefault(storage["role"], [])
    chats.append({"greeting": greeting, "turns": list(turns)})
    storage["shown"][storage["role"]] = len(chats) - 1
    return chats[-1]


def remove(storage: dict):
    """Forget the conversation that is shown."""
    role = storage["role"]
    chats, number = storage["chats"][role], storage["shown"][role]
    del chats[number]
    storage["shown"][role] = max(min(number, len(chats) - 1), 0)
    if not chats:
        del storage["chats"][role]


def shown_version(turn: dict) -> dict:
    """The version of the answer that is shown, and read by the model."""
    return turn["versions"][turn["shown"]] if turn["versions"] else dict(EMPTY_VERSION)


def add_turn(chat: dict, question: str):
    chat["turns"].append({"question": question, "versions": [], "shown": 0})


def add_version(turn: dict, **fields):
    turn["versions"].append(EMPTY_VERSION | fields)
    turn["shown"] = len(turn["versions"]) - 1


def growing(storage: dict) -> dict:
    """The last answer of the conversation that is shown, and whose it is."""
    role, number = storage["role"], storage["shown"][storage["role"]]
    turn = storage["chats"][role][number]["turns"][-1]
    return {"role": role, "chat": number, "question": turn["question"], "version": dict(shown_version(turn))}


def settle(storage: dict, grown: dict, ended: bool = True) -> str:
    """Keep an answer as far as it is written, in the conversation that it belongs to.

    Args:
        grown: what `growing` has given; {} where there is none.
        ended: an answer without a word goes away, and its question too, where it is the only one.

    Returns: the questions that have gone.
    """
    lost = []
    for role, conversations in storage["chats"].items():
        for number, chat in enumerate(conversations):
            turn = chat["turns"][-1] if chat["turns"] else {}
            if (role, number, turn.get("question")) == (grown.get("role"), grown.get("chat"), grown.get("question")):
                turn["versions"][turn["shown"] : turn["shown"] + 1] = [grown["version"]]
            if turn and ended and not shown_version(turn)["text"].strip():
                del turn["versions"][turn["shown"] : turn["shown"] + 1]
                turn["shown"] = max(len(turn["versions"]) - 1, 0)
                if not turn["versions"]:
                    lost.append(chat["turns"].pop()["question"])
    return "\n".join(lost)


def as_messages(chat: dict, count: int, greeted: bool, whose: str = "text") -> list[dict]:
    """The first `count` turns as messages. whose: whose answers, the tuned model's (text) or the base model's."""
    messages = [{"role": "assistant", "content": chat["greeting"]}] if greeted and chat["greeting"] else []
    for turn in chat["turns"][:count]:
        if (version := shown_version(turn))["text"]:
            messages.append({"role": "user", "content": turn["question"]})
            messages.append({"role": "assistant", "content": version[whose] or version["text"]})
    return messages


def prompt(chat: dict, system: str, greeted: bool, whose: str = "text") -> list[dict]:
    """What the model reads before it answers the last question."""
    last = len(chat["turns"]) - 1
    question = {"role": "user", "content": chat["turns"][last]["question"]}
    return [{"role": "system", "content": system}, *as_messages(chat, last, greeted, whose), question]


def samples(storage: dict, system: str, greeted: bool) -> str:
    """The conversations with a role as training data, JSON lines: each as it is shown, up to its last finished answer.

    An answer that was stopped or cut ends the sample before it, since it would be learnt as a whole one.
    """
    lines = []
    for chat in storage["chats"].get(storage["role"], []):
        finished = 0
        while finished < len(chat["turns"]) and shown_version(chat["turns"][finished])["state"] in ("done", "edited"):
            finished += 1
        if finished:
            sample = {"role": storage["role"], "system": system, "messages": as_messages(chat, finished, greeted)}
            lines.append(json.dumps(sample, ensure_ascii=False) + "\n")
    return "".join(lines)
