"""Real text that is installed with Python: the paragraphs of its language reference."""

from pydoc_data.topics import topics


def prose():
    """The beginning of each longer paragraph, 25 words, and how it goes on, 15 words."""
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            words = paragraph.split()
            if len(words) > 40 and paragraph.strip()[0].isalpha():
                yield " ".join(words[:25]), " ".join(words[25:40])
