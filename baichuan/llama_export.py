"""LLaMA export."""
def llama_tensors(t): return t
def save_llama(*a): pass
