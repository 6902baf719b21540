"""Chat with a role in the browser.

    python3 web_demo.py --device 0 --model_path "output_dir/epoch-1-step-1002-merge" --desc_path "data/profiles-zh_desc.json"
    python3 web_demo.py --model_path Baichuan2-7B-Chat/ --adapter_path output_dir/epoch-1-step-1002    # before and after
    python3 web_demo.py --ask "你是谁？" --role 李白        # one greedy answer on the terminal, and no page

In the order of reading: the arguments, what the page is told, an answer, the paths. The browser keeps the conversations
and sends what the model shall read; the server forgets it. Beside this file stand support/speaker.py, which answers,
support/page_guard.py, which checks everything a browser sends; page.js, page.css and page_texts.json, the page itself.
"""

import asyncio
import json
import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path

from data_helper import conversation, example_questions, persona
from support.arguments import ArgumentParser
from support.errors import Problems, UserError, entry_point, slow_imports
from support.files import followed
from support.json_files import composed, read_object, text_problem
from support.profiles import MAX_DESCRIPTION, MAX_NAME, read_characters

SUPPORT = Path(__file__).parent / "support"
PERIOD = 0.05  # seconds between two updates of a growing answer
# What transformers takes where a model's generation_config says nothing; the longest answer is ours.
UNSET = {"max_new_tokens": 512, "temperature": 1, "top_p": 1, "top_k": 50, "repetition_penalty": 1, "seed": -1}
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif")


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model_path", type=Path, default="output_dir/epoch-1-step-1002-merge", help="directory of a whole model")
    add("--adapter_path", type=followed, help="directory of a PEFT adapter over --model_path, served without merging")
    add("--load_in_4bit", action="store_true", help="hold the linear layers in 4 bits: 5 GB instead of 15 at 7B")
    add("--desc_path", type=Path, default="data/profiles-zh_desc.json", help="JSON file {role: description}")
    add("--device", default="auto", help="a GPU's number; cpu (or -1); auto: a GPU where there is one")
    add("--server_name", default="127.0.0.1", help="address to listen on; 0.0.0.0: all, see --allowed_hosts")
    add("--port", type=int, default=9090, help="TCP port of the page")
    add("--allowed_hosts", nargs="+", default=[], help="further names and addresses that others type")
    add("--auth_file", type=Path, help="file with USER:PASSWORD, to sign in with; or WEB_DEMO_AUTH in the environment")
    add("--ask", metavar="QUESTION", help="print one greedy answer instead of serving the page")
    add("--role", type=composed, help="the role that --ask asks (default: the first of --desc_path)")
    return parser.parse_args(argv)


# After the arguments, since these take seconds.
with slow_imports(parse_args, __name__):
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at gradio's import: the page reports to nobody
    import gradio as gr
    import torch
    from starlette.responses import FileResponse, HTMLResponse, JSONResponse
    from starlette.routing import Route

    from support import page_guard as guard
    from support.adapter import refuse_other_base
    from support.model_directory import ModelDirectory, pick_device
    from support.page_guard import Refusal
    from support.speaker import Speaker, TooLong


def check(args) -> tuple[torch.device, dict[str, dict], str | None]:
    """The device, the characters, and USER:PASSWORD if there is one. Raises: UserError with all that is wrong."""
    account = os.environ.get("WEB_DEMO_AUTH")
    with Problems() as problems:
        model = problems.of(ModelDirectory(args.model_path).check, args.load_in_4bit)
        device = problems.of(pick_device, args.device)
        characters = problems.of(read_characters, args.desc_path) or {}
        for role, character in characters.items():
            image = args.desc_path.parent / character["portrait"]
            if character["portrait"] and not (image.is_file() and image.suffix.lower() in IMAGES):
                problems.append(f"{image}: the portrait of {role} must be a file {', '.join(IMAGES)}")
        if args.adapter_path:
            problems.of(read_object, args.adapter_path / "adapter_config.json")
        if args.adapter_path and model:
            problems.of(refuse_other_base, model, args.adapter_path)
        for role, character in characters.items() if model else ():
            length, context = len(model.tokenizer.text_to_ids(character["description"])), model.config.model_max_length
            if length > context // 2:
                told = f"the profile of {role} takes {length:,} of the model's {context:,} tokens: shorten it"
                print(f"warning: {args.desc_path}: {told}", file=sys.stderr)
        if args.role is not None and characters and args.role not in characters:
            problems.append(f"--role {args.role}: {args.desc_path} has {', '.join(characters)}")
        if args.auth_file:
            try:
                account = args.auth_file.read_text(encoding="utf-8-sig").strip()
            except (OSError, UnicodeDecodeError) as error:
                problems.append(f"--auth_file {args.auth_file}: cannot be read: {error}")
        if account is not None and not re.fullmatch("[^:\n]+:[^\n]+", account):
            where = f"--auth_file {args.auth_file}" if args.auth_file else "WEB_DEMO_AUTH"
            problems.append(f"{where}: must hold USER:PASSWORD, neither of them empty")
        if args.ask is not None and (problem := text_problem(args.ask)):
            problems.append(f"--ask {problem}")
        if args.ask is None:
            problems += guard.port_problems(args.server_name, args.port)
    return device, characters, account


# ---------------------------------------------------------------- what the page is told


class Page:
    """Everything that is served: see `routes`."""

    def __init__(self, speaker: Speaker, characters: dict[str, dict], desc_path: Path, door: guard.Door):
        self.speaker, self.characters, self.door = speaker, characters, door
        images = enumerate(character["portrait"] for character in characters.values())
        self.portraits = {number: desc_path.parent / image for number, image in images if image}
        self.line = guard.Line()
        self.ends: set[asyncio.Task] = set()  # answers that are being ended; asyncio itself would forget them

    def facts(self, request) -> dict:
        """What page.js works with."""
        own = self.speaker.model.generation_config
        settings = {"do_sample": bool(own.do_sample)}
        for name, (kind, low, high, _) in guard.SETTINGS.items():
            value = getattr(own, name, None)
            settings[name] = min(max(kind(UNSET[name] if value is None else value), low), high)
        return {
            "characters": {
                role: character | {"portrait": f"/portrait/{number}" if number in self.portraits else ""}
                for number, (role, character) in enumerate(self.characters.items())
            },
            "persona": persona("{role}", "{description}"),
            "texts": guard.TEXTS[guard.language(request)],
            "settings": settings,
            "ranges": {name: range[1:] for name, range in guard.SETTINGS.items()} | {"strength": guard.STRENGTH[1:]},
            "limits": {"role": MAX_NAME, "description": MAX_DESCRIPTION, "question": guard.MAX_QUESTION},
            "tuned": self.speaker.adapter is not None,
            "stand_in": hasattr(self.speaker.model.config, "stand_in"),
            "sign_out": self.door.account is not None,
        }

    async def index(self, request):
        if self.door.account is not None and self.door.visitor(request) is None:
            return self.document(request, {"texts": guard.TEXTS[guard.language(request)]}, "login.js")
        response = self.document(request, self.facts(request), "page.js")
        return response if self.door.visitor(request) else self.door.welcome(response)

    def document(self, request, facts: dict, script: str) -> HTMLResponse:
        # In a script element only "</" and "<!--" are more than text.
        data = json.dumps(facts, ensure_ascii=False).replace("<", "\\u003c")
        language = {"zh": "zh-CN"}.get(guard.language(request), "en")
        return HTMLResponse(
            f"""<!doctype html>
<html lang="{language}"><meta charset="utf-8"><title>Baichuan2 · {guard.say(request, "title")}</title>
<meta name="viewport" content="width=device-width, initial-scale=1, interactive-widget=resizes-content">
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,"><link rel="stylesheet" href="/page.css">
<script type="application/json" id="facts">{data}</script><body></body><script src="/{script}"></script></html>"""
        )

    async def file(self, request):
        return FileResponse(SUPPORT / request.url.path.strip("/"))

    async def portrait(self, request):
        return FileResponse(self.portraits[request.path_params["number"]])

    # ---------------------------------------------------------------- an answer

    async def answer(self, request):
        """Lines of JSON: {"place"}, {"note"}, {"text"} as the answer grows, and at last {"cut"} or {"error"}."""
        try:
            asked = self.checked(await guard.read_json(request))
            _, room, forgotten = await asyncio.to_thread(
                self.speaker.fit, asked["messages"], asked["settings"]["max_new_tokens"], asked["begun"]
            )
            place = self.line.enter(self.door.visitor(request), request.client.host)
        except TooLong as error:
            raise Refusal("too_long", needed=error.needed, context=error.context) from None
        wanted = asked["settings"]["max_new_tokens"]
        notes = [guard.say(request, "short", room=room, wanted=wanted)] if room < wanted else []
        notes += [guard.say(request, "forgotten")] if forgotten else []
        return guard.Stream(self.lines(request, asked, place, " ".join(notes)), place)

    async def lines(self, request, asked: dict, place: guard.Place, note: str):
        stream, step = None, None
        try:
            if note:
                yield {"note": note}
            place.moved.clear()  # before the look at the queue: while "place" is sent it may move again
            while (number := self.line.places.index(place)) and not place.gone:
                yield {"place": number}
                await place.moved.wait()
                place.moved.clear()
            stream, due, text = self.speaker.answer(**asked), 0.0, ""
            while not place.gone:
                step = asyncio.ensure_future(asyncio.to_thread(guard.advance, stream))
                text, end = await step
                if end is not None:
                    yield {"text": end[0], "cut": end[1]}
                    return
                if time.monotonic() >= due:
                    yield {"text": text}
                    due = time.monotonic() + PERIOD
        except MemoryError:
            yield {"error": guard.say(request, "memory")}
        except Exception as error:  # told to the visitor in words, and to the log in a line
            print(f"error: an answer failed: {type(error).__name__}: {error}", flush=True)
            yield {"error": guard.say(request, "failed")}
        finally:
            ending = asyncio.create_task(self.end(place, stream, step))
            self.ends.add(ending)
            ending.add_done_callback(self.ends.discard)

    async def end(self, place, stream, step):
        """Stop the model, and let the next one in."""
        try:
            if step is not None:
                await asyncio.wait([step])
            if stream is not None:
                await asyncio.to_thread(stream.close)
        finally:
            self.line.leave(place)

    async def words(self, request):
        """How much likelier the adapter makes each word of an answer: [[word, difference in nats], …]."""
        body = await guard.read_json(request)
        asked = self.checked(body)
        answer = guard.checked_answer(body.get("answer"))
        if self.speaker.adapter is None:
            raise Refusal("no_call")
        place = self.line.enter(self.door.visitor(request), request.client.host)
        try:
            while self.line.places.index(place):
                place.moved.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(place.moved.wait(), 1)
                if await request.is_disconnected():
                    return JSONResponse({})
            words = await asyncio.to_thread(self.speaker.words, asked["messages"], answer, asked["strength"])
        except TooLong as error:
            raise Refusal("too_long", needed=error.needed, context=error.context) from None
        except MemoryError:
            raise Refusal("memory", 503) from None
        except Exception as error:
            print(f"error: the words of an answer failed: {type(error).__name__}: {error}", flush=True)
            raise Refusal("failed", 500) from None
        finally:
            self.line.leave(place)
        return JSONResponse({"words": words})

    def checked(self, body: dict) -> dict:
        """The arguments of `Speaker.answer`, from what page.js sends."""
        role = guard.checked_text("role", body.get("role"), MAX_NAME)
        description = guard.checked_text("description", body.get("description"), MAX_DESCRIPTION)
        messages = guard.checked_messages(body.get("messages"))
        asked = {
            "messages": [{"role": "system", "content": persona(role, description)}, *messages],
            "settings": guard.checked_settings(body.get("settings")),
            "begun": guard.checked_answer(body.get("begun", "")),
            "base": guard.checked_switch("compare", body.get("base", False)) and self.speaker.adapter is not None,
            "strength": guard.checked_number("strength", body.get("strength", 1.0), *guard.STRENGTH[:3]),
        }
        return asked

    # ---------------------------------------------------------------- the paths

    async def sign_in(self, request):
        body = await guard.read_json(request)
        if self.door.account is None or not self.door.try_password(request.client.host, body.get("account")):
            raise Refusal("wrong_password", 403)
        return self.door.welcome(JSONResponse({}), signed_in=True)

    async def sign_out(self, request):
        response = JSONResponse({})
        response.delete_cookie(self.door.cookie)
        return response

    def app(self) -> gr.Server:
        files = [Route(f"/{name}", self.file) for name in ("page.css", "page.js", "login.js")]
        calls = {"answer": self.answer, "words": self.words, "login": self.sign_in, "logout": self.sign_out}
        routes = [Route("/", self.index), Route("/portrait/{number:int}", self.portrait), *files]
        routes += [Route(f"/{name}", call, methods=["POST"]) for name, call in calls.items()]

        async def not_found(request, error):
            return guard.refused(request, Refusal("no_path", getattr(error, "status_code", 404)))

        handlers = {Refusal: guard.refused, 404: not_found, 405: not_found, KeyError: not_found}
        server = gr.Server(openapi_url=None)
        server.router.routes[:] = routes  # the page's own; gradio's would be closed by the gate
        for kind, handler in handlers.items():
            server.add_exception_handler(kind, handler)
        server.add_middleware(guard.Gate, door=self.door)
        return server


def answer_once(speaker: Speaker, role: str, description: str, question: str) -> str:
    messages = conversation(persona(role, description), question)
    longest = speaker.model.generation_config.max_new_tokens or UNSET["max_new_tokens"]
    settings = {"do_sample": False, "seed": 0, "max_new_tokens": longest}
    try:
        return "".join([*speaker.answer(messages, settings)][-1:])  # the last text is the whole answer
    except (TooLong, MemoryError) as error:
        raise UserError(f"--ask: {error}") from error


@entry_point
def main(argv=None):
    args = parse_args(argv)
    device, characters, account = check(args)
    speaker = Speaker.load(args.model_path, args.adapter_path, device, args.load_in_4bit)
    if args.ask is not None:
        role = args.role or next(iter(characters))
        return print(answer_once(speaker, role, characters[role]["description"], args.ask))
    for role, questions in example_questions(args.desc_path, characters).items():
        characters[role]["questions"] = characters[role]["questions"] or questions
    if account is None and not guard.is_loopback(args.server_name):
        print(f"warning: whoever reaches {args.server_name} can use the page; --auth_file lets only some in")
    door = guard.Door(guard.allowed_hosts(args.server_name, args.allowed_hosts), account, args.port)
    page = Page(speaker, characters, args.desc_path, door)
    guard.serve(
        page.app(), args.server_name, args.port, lambda url: print(f"{args.model_path} answers on {url}", flush=True)
    )


if __name__ == "__main__":
    main()
