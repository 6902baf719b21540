"""The chat page of web_demo.py, behind its layout. For who changes the page.

web_demo.py lays out gradio's components and connects them. A visitor's conversations are kept by the browser: every
listener gets them from it and gives them back. What gradio holds of the last visits is in memory alone (docs/chat.md).

In the order of reading:

    speaker.py    who answers: a model that keeps within its context and reads a role's persona once
    chats.py      what the browser keeps, as plain dicts, and what the model reads of it
    visit.py      one event of the page: what the browser keeps, opened, and the page as it is shown afterwards
    hosts.py      who may call the page, under which names and password; whether it can listen
    look.py       colours, pictures and texts, from page.css and texts.json ([English, Chinese])
    page.js       what the browser does beside gradio's components: drafts, panels, tabs, exact copies
"""
