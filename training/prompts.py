"""Natural prompts of several kinds that a model is measured on; none of them is in the training text."""

from __future__ import annotations

PROMPTS = {
    "technical": (
        "The function reads the configuration file, checks every entry against the schema and returns a "
        "dictionary. If a required key is missing it raises ValueError, so the caller should be prepared to handle "
        "that. Entries that are not known are ignored, unless the strict flag is set. The result can be passed on "
        "to the constructor of the client, which opens a connection to the server and keeps it until it is closed "
        "explicitly."
    ),
    "code": (
        "def count_words(path, encoding='utf-8'):\n    counts = {}\n    with open(path, encoding=encoding) as "
        "file:\n        for line in file:\n            for word in line.split():\n                counts[word] = "
        "counts.get(word, 0) + 1\n    return counts\n\n\nif __name__ == '__main__':\n    import sys\n    for name "
        "in sys.argv[1:]:\n        print(count_words(name))\n"
    ),
    "story": (
        "Once upon a time there was a little girl who lived in a house near the forest. Every morning she walked "
        "to the river and fed the ducks. One day the ducks were gone, and she asked the old fisherman where they "
        'were. He smiled and pointed at the sky. "They have gone south," he said. "When the snow melts, they will '
        'be back." The girl waited all winter long, and in spring she heard them before she saw them.'
    ),
    "news": (
        "The city council voted on Tuesday to rebuild the bridge that was damaged by last month's flood. Work is "
        "expected to begin in June and to cost about 14 million dollars. Until then, buses will use the road along "
        "the northern shore. Shop owners on the island welcomed the decision, but said that it had come too late "
        "for many of them: sales have fallen by a third since the bridge was closed."
    ),
    "science": (
        "Water boils at a lower temperature on a mountain because the air pressure is lower there. A liquid boils "
        "when its vapour pressure equals the pressure around it. At sea level this happens at 100 degrees; at 3000 "
        "metres it happens at about 90 degrees. This is why potatoes take longer to cook in the mountains, and why "
        "a pressure cooker, in which the pressure is higher, makes them tender sooner."
    ),
    "dialogue": (
        "A: Did you find the keys?\nB: No, I looked everywhere. In the kitchen, in the car, under the bed.\nA: And "
        "the green coat?\nB: I have not looked there yet. Wait a moment.\nA: Well?\nB: You were right. They were "
        "in the left pocket, together with the ticket that I lost in March.\nA: Then we can go. The train leaves "
        "at 10:45, and it is already half past nine.\nB: I am ready. Let us hurry.\n"
    ),
    "list": (
        "Shopping list:\n- 2 bottles of milk\n- 1 kg of flour\n- 6 eggs\n- butter, salt and sugar\n- a lemon\n\nTo "
        "do before Friday:\n1. Call the landlord about the heating.\n2. Pay the phone bill (38.50).\n3. Return the "
        "books to the library.\n4. Buy a birthday present for Anna.\n5. Water the plants; the ones on the balcony, "
        "too.\n"
    ),
    "letter": (
        "Dear Mrs. Miller,\n\nthank you very much for your letter of 3 May. I am glad to hear that the parcel has "
        "arrived safely, and sorry that one of the cups was broken. Of course we will send you a new one at once. "
        "Would you be so kind as to tell us which of the two colours you had ordered? With kind regards, and best "
        "wishes to your husband,\n\nJohn Carter\n"
    ),
}

DELIMITERS = (".", ",", ":", ";", "\n", "\n\n", "(", ")", '"', "'", "-", " and", " the", " of", "</s>")
