"""What a library call tells, kept for tests."""

from peft_onelayer.runs.progress import Progress


class Told(Progress):
    """Keeps the notes, in their order."""

    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)
