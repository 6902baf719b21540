"""The chat page of web_demo.py, behind its layout: who answers, what the browser keeps, who may call, look and texts."""
