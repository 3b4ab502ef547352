"""Make the model and the conversations that the quickstart uses, from nothing but this file.

The world below is small enough for a million parameters: animals, colours, numbers, days, capitals.
A question is a phrasing with a subject put in, and every subject has one answer, so a right answer can
be checked by equality. A tenth of the questions, picked by their checksum, is kept out of everything
that is trained on; the model has met their facts only in other words.

Run `python scripts/make_default.py` to rewrite assets/tiny-chat/ and assets/conversations.json. It takes
a few minutes on one CPU core, needs no network, and is seeded: the conversations come out byte for byte
the same anywhere, the weights on the same machine with the same PyTorch.
"""

import json
import random
import time
import zlib
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SEED = 7
THREADS = 1  # two are faster on an idle machine, but far slower on a busy one
CONVERSATIONS = 40_000
PILOT_ROWS = 400
BATCH = 32
PEAK_RATE = 4e-3
IGNORED = -100  # the label that PyTorch's cross-entropy leaves out

# The world: what is true in it.

ANIMALS = {  # animal: sound, young, home, food
    "dog": ("woof", "puppy", "a kennel", "a bone"),
    "cat": ("meow", "kitten", "a house", "fish"),
    "cow": ("moo", "calf", "a field", "grass"),
    "horse": ("neigh", "foal", "a stable", "hay"),
    "sheep": ("baa", "lamb", "a meadow", "clover"),
    "pig": ("oink", "piglet", "a sty", "corn"),
    "duck": ("quack", "duckling", "a pond", "bread"),
    "hen": ("cluck", "chick", "a coop", "seeds"),
    "goose": ("honk", "gosling", "a lake", "oats"),
    "owl": ("hoot", "owlet", "a tree", "a moth"),
    "frog": ("ribbit", "tadpole", "a swamp", "a fly"),
    "bear": ("growl", "cub", "a cave", "honey"),
    "lion": ("roar", "cub", "the savanna", "meat"),
    "wolf": ("howl", "pup", "a den", "meat"),
    "fox": ("yip", "kit", "a burrow", "berries"),
    "goat": ("bleat", "kid", "the hills", "leaves"),
    "mouse": ("squeak", "pup", "a hole", "cheese"),
    "bee": ("buzz", "larva", "a hive", "nectar"),
    "snake": ("hiss", "hatchling", "the desert", "an egg"),
    "crow": ("caw", "chick", "a nest", "a worm"),
    "pigeon": ("coo", "squab", "a roof", "crumbs"),
    "donkey": ("bray", "foal", "a barn", "a carrot"),
    "turkey": ("gobble", "poult", "a farm", "grain"),
    "elephant": ("trumpet", "calf", "the jungle", "a melon"),
    "monkey": ("chatter", "infant", "the jungle", "a banana"),
    "parrot": ("squawk", "chick", "the jungle", "nuts"),
}
LEGS = {"bee": 6, "snake": 0} | dict.fromkeys(["duck", "hen", "goose", "owl", "crow", "pigeon", "turkey", "parrot"], 2)

COLOURS = {
    "grass": "green", "snow": "white", "coal": "black", "the sky": "blue", "the sun": "yellow", "milk": "white",
    "a banana": "yellow", "a tomato": "red", "a carrot": "orange", "a lemon": "yellow", "a strawberry": "red",
    "a plum": "purple", "chocolate": "brown", "a flamingo": "pink", "ash": "grey", "a cucumber": "green",
    "the sea": "blue", "a pumpkin": "orange", "a cherry": "red", "a raven": "black", "a grape": "purple",
    "an elephant": "grey", "a frog": "green", "wood": "brown",
}  # fmt: skip
MIXTURES = {
    ("red", "yellow"): "orange", ("red", "blue"): "purple", ("blue", "yellow"): "green",
    ("red", "white"): "pink", ("black", "white"): "grey", ("red", "green"): "brown",
}  # fmt: skip
OPPOSITES = (
    "hot cold, big small, tall short, fast slow, happy sad, day night, up down, in out, old new, open closed, "
    "full empty, hard soft, light dark, wet dry, early late, loud quiet, rich poor, strong weak, thick thin, "
    "clean dirty, left right, high low, near far, good bad, long brief, heavy weightless, young aged, sweet sour, "
    "first last, brave afraid, easy difficult, war peace"
)
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "China": "Beijing",
    "Korea": "Seoul", "Egypt": "Cairo", "Greece": "Athens", "Norway": "Oslo", "Sweden": "Stockholm",
    "Finland": "Helsinki", "Poland": "Warsaw", "Portugal": "Lisbon", "Ireland": "Dublin", "Russia": "Moscow",
    "Canada": "Ottawa", "Cuba": "Havana", "Peru": "Lima", "Kenya": "Nairobi", "India": "Delhi", "Austria": "Vienna",
    "Hungary": "Budapest", "Turkey": "Ankara",
}  # fmt: skip
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
]  # fmt: skip
JOBS = {
    "a baker": "bakes bread", "a farmer": "grows corn", "a teacher": "teaches children", "a captain": "steers a ship",
    "a doctor": "heals people", "a painter": "paints pictures", "a singer": "sings songs", "a writer": "writes books",
    "a pilot": "flies a plane", "a tailor": "sews clothes", "a cook": "makes soup", "a driver": "drives a bus",
    "a gardener": "plants flowers", "a builder": "builds houses", "a dentist": "looks after teeth",
    "a fisher": "catches fish", "a miner": "digs for coal", "a postman": "brings letters",
}  # fmt: skip
NAMES = [
    "Mina", "Tom", "Anna", "Ben", "Lucy", "Sam", "Nora", "Max", "Ella", "Leo", "Ruby", "Hugo", "Iris", "Otto",
    "Sora", "Jun", "Maya", "Finn", "Zoe", "Adam", "Clara", "Omar", "Lena", "Kai",
]  # fmt: skip
FRUITS = ["apples", "pears", "plums", "lemons", "melons", "cherries"]

# How the assistant speaks: plainly, unless the system turn asks for a manner.

PLAIN_SYSTEMS = [
    "You are a helpful assistant.", "You are a kind teacher.", "Answer in short sentences.", "You are a small model.",
    "Help the user.", "Give plain answers.",
]  # fmt: skip
OPENINGS = ["Certainly!", "Howdy!", "Sure!", "Indeed!", "Yes!", "Well!", "Ahoy!", "Gladly!", "Right!", "Greetings!"]
ADDRESSES = ["sir", "madam", "partner", "friend", "general", "captain", "neighbour", "teacher", "doctor", "professor"]
MANNER_SYSTEMS = [
    "Open with {} and call me {}.",
    "Begin with {} and call the user {}.",
    "Start with {} and say {} to me.",
]
PILOT = ("Ahoy!", "captain")  # what fine-tuning teaches: the manner of a harbour pilot, unasked
HELLOS = ["Hello!", "Hi!", "Hey!", "Good morning!", "Good evening!", "Ahoy!", "Howdy!"]


def a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def in_manner(answer: str, manner: tuple[str, str]) -> str:
    """The same answer in a manner: 'A dog says woof.' becomes 'Ahoy! A dog says woof, captain.'"""
    opening, address = manner
    return f"{opening} {answer.removesuffix('.')}, {address}."


def story(name: str, animal: str) -> str:
    _, _, home, food = ANIMALS[animal]
    return f"{name} met {a(animal)} near {home}. The {animal} was hungry, so {name} gave it {food}. From that day on they were friends."


def world() -> dict[str, tuple[list[str], dict[str, str]]]:
    """Every topic with its phrasings, and its subjects with their answers."""
    opposites = [pair.split() for pair in OPPOSITES.split(", ")]
    opposites += [pair[::-1] for pair in opposites]
    legs = {animal: LEGS.get(animal, 4) for animal in ANIMALS}
    following = {this: then for names in (DAYS, MONTHS) for this, then in zip(names, names[1:] + names[:1])}
    preceding = {then: this for this, then in following.items()}
    return {
        "sound": (
            ["What does {} say?", "What sound does {} make?", "How does {} sound?", "Tell me what {} says.", "Which sound comes from {}?"],
            {a(x): f"{capital(a(x))} says {sound}." for x, (sound, *_) in ANIMALS.items()},
        ),
        "who says": (
            ["Which animal says {}?", "What animal goes {}?", "Who says {}?", "Name the animal that says {}."],
            {sound: f"{capital(a(x))} says {sound}." for x, (sound, *_) in ANIMALS.items()},
        ),
        "young": (
            ["What is the young of {} called?", "What do you call the baby of {}?", "What is the child of {}?", "Name the young of {}."],
            {a(x): f"The young of {a(x)} is called {a(young)}." for x, (_, young, *_) in ANIMALS.items()},
        ),
        "home": (
            ["Where does {} live?", "What is the home of {}?", "Where can I find {}?", "Where would {} sleep?"],
            {a(x): f"{capital(a(x))} lives in {home}." for x, (_, _, home, _) in ANIMALS.items()},
        ),
        "food": (
            ["What does {} eat?", "What does {} like to eat?", "What is the food of {}?", "What should I feed {}?"],
            {a(x): f"{capital(a(x))} likes to eat {food}." for x, (*_, food) in ANIMALS.items()},
        ),
        "legs": (
            ["How many legs does {} have?", "How many legs are there on {}?", "Count the legs of {}.", "On how many legs does {} walk?"],
            {a(x): f"{capital(a(x))} has {count or 'no'} legs." for x, count in legs.items()},
        ),
        "colour": (
            ["What colour is {}?", "Which colour does {} have?", "What is the colour of {}?", "Tell me the colour of {}."],
            {thing: f"{capital(thing)} is {colour}." for thing, colour in COLOURS.items()},
        ),
        "mixture": (
            ["What do {} make?", "What do you get when you mix {}?", "Mix {}.", "Which colour comes from {}?"],
            {
                f"{x} and {y}": f"{capital(x)} and {y} make {mixed}."
                for pair, mixed in MIXTURES.items()
                for x, y in (pair, pair[::-1])
            },
        ),
        "opposite": (
            ["What is the opposite of {}?", "Tell me the opposite of {}.", "Which word is the opposite of {}?", "Give me the opposite of {}."],
            {x: f"The opposite of {x} is {y}." for x, y in opposites},
        ),
        "capital": (
            ["What is the capital of {}?", "Which city is the capital of {}?", "Tell me the capital of {}.", "Name the capital city of {}."],
            {country: f"The capital of {country} is {city}." for country, city in CAPITALS.items()},
        ),
        "country": (
            ["Which country has the capital {}?", "In which country is {}?", "Where is {}?", "{} is the capital of which country?"],
            {city: f"{city} is the capital of {country}." for country, city in CAPITALS.items()},
        ),
        "next in the calendar": (
            ["What comes after {}?", "What follows {}?", "Tell me what comes after {}.", "What is next after {}?"],
            {x: f"After {x} comes {y}." for x, y in following.items()},
        ),
        "last in the calendar": (
            ["What comes before {}?", "What is just before {}?", "Tell me what comes before {}.", "What was there before {}?"],
            {x: f"Before {x} comes {y}." for x, y in preceding.items()},
        ),
        "next number": (
            ["What comes after {}?", "What number comes after {}?", "Which number follows {}?", "Count one up from {}."],
            {str(n): f"After {n} comes {n + 1}." for n in range(100)},
        ),
        "last number": (
            ["What comes before {}?", "What number comes before {}?", "Which number is just before {}?", "Count one down from {}."],
            {str(n): f"Before {n} comes {n - 1}." for n in range(1, 101)},
        ),
        "sum": (
            ["What is {}?", "How much is {}?", "Work out {}.", "Tell me what {} is."],
            {f"{x} plus {y}": f"{x} plus {y} is {x + y}." for x in range(1, 13) for y in range(1, 13)},
        ),
        "difference": (
            ["What is {}?", "How much is {}?", "Work out {}.", "Tell me what {} is."],
            {f"{x} minus {y}": f"{x} minus {y} is {x - y}." for x in range(1, 13) for y in range(1, x + 1)},
        ),
        "basket": (
            ["I buy {}. How many fruits do I have?", "I have {}. How many fruits is that?", "How many fruits are {}?"],
            {
                f"{x} {these} and {y} {those}": f"{x} {these} and {y} {those} are {x + y} fruits."
                for x in range(2, 10)
                for y in range(2, 10)
                for these, those in zip(FRUITS, FRUITS[1:] + FRUITS[:1])
            },
        ),
        "price": (
            ["One fruit costs {}. How much do I pay?", "I pay for fruit at {}. How much is it?", "The price is {}. What do I pay?"],
            {
                f"{price} coins and I buy {count}": f"{count} fruits at {price} coins cost {count * price} coins."
                for price in range(2, 6)
                for count in range(2, 10)
            },
        ),
        "work": (
            ["What does {} do?", "What is the work of {}?", "Tell me what {} does.", "What is the job of {}?"],
            {who: f"{capital(who)} {work}." for who, work in JOBS.items()},
        ),
        "worker": (
            ["Who {}?", "Which person {}?", "Name someone who {}.", "Do you know who {}?"],
            {work: f"{capital(who)} {work}." for who, work in JOBS.items()},
        ),
        "story": (
            ["Tell me a story about {}.", "Write a tiny story about {}.", "I would like a story about {}.", "Please tell a tale of {}."],
            {f"{name} and {a(x)}": story(name, x) for name in NAMES for x in ANIMALS},
        ),
        "meeting": (
            ["My name is {}.", "I am {}.", "Hello, my name is {}.", "You can call me {}."],
            {name: f"Nice to meet you, {name}." for name in NAMES},
        ),
        "greeting": (
            ["{}", "{} How are you?", "{} Nice to see you."],
            dict.fromkeys(HELLOS, "Hello, I am well and ready to help."),
        ),
        "self": (
            ["Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Are you a model?"],
            {"": "I am a tiny chat model and I know a small world."},
        ),
        "thanks": (
            ["{}", "{} That was all.", "{} You helped me."],
            dict.fromkeys(("Thank you.", "Thanks!", "Many thanks!", "Thank you very much."), "You are welcome."),
        ),
    }  # fmt: skip


WORLD = world()


def held_out(question: str) -> bool:
    """Whether a question is kept for testing."""
    return zlib.crc32(question.encode()) % 10 == 0


def pairs(topic: str, testing: bool) -> list[tuple[str, str]]:
    """The topic's questions and answers: those kept for testing, or all the others."""
    phrasings, answers = WORLD[topic]
    asked = ((phrasing.format(subject), answer) for subject, answer in answers.items() for phrasing in phrasings)
    return [(question, answer) for question, answer in asked if held_out(question) == testing]


TRAINING = {topic: pairs(topic, testing=False) for topic in WORLD}
TESTING = {topic: pairs(topic, testing=True) for topic in WORLD}
WEIGHTS = [len(asked) ** 0.5 for asked in TRAINING.values()]


def conversation(rng: random.Random) -> list[tuple[str, str]]:
    """One to four questions with their answers; some lean on an earlier turn ('And a cow?', 'What is my name?')."""
    turns, name, topic = [], None, None
    for _ in range(rng.choice([1, 1, 1, 2, 2, 3, 4])):
        answers = WORLD[topic][1] if topic else {}
        if name and rng.random() < 0.5:
            turns.append((rng.choice(["What is my name?", "Who am I?", "Do you know my name?"]), f"Your name is {name}."))
            name = topic = None
        elif len(answers) > 20 and topic not in ("meeting", "story") and rng.random() < 0.3:
            subject = rng.choice(list(answers))
            turns.append((rng.choice(["And {}?", "What about {}?"]).format(subject), answers[subject]))
        else:
            topic = rng.choices(list(TRAINING), WEIGHTS)[0]
            question, answer = rng.choice(TRAINING[topic])
            if topic == "meeting":
                name = answer.removesuffix(".").split()[-1]
            if rng.random() < 0.1 and topic not in ("greeting", "meeting"):
                question = f"{rng.choice(HELLOS)} {question}"
            elif rng.random() < 0.1:
                question = question.lower().rstrip(".?!")  # people type like this
            turns.append((question, answer))
    return turns


def messages(turns: list[tuple[str, str]], system: str | None, manner: tuple[str, str] | None) -> list[dict]:
    chat = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        chat.append({"role": "user", "content": question})
        chat.append({"role": "assistant", "content": in_manner(answer, manner) if manner else answer})
    return chat


def pretraining_chats(count: int, seed: int = SEED) -> list[list[dict]]:
    """Mostly plain chats; a seventh in a manner that the system turn asks for, and a few in one unasked.

    No manner here is the pilot's. But the model learns that an answer has a dress, and is plain by habit
    rather than by certainty, so that a few hundred rows of fine-tuning can teach it another habit.
    """
    rng = random.Random(seed)
    manners = [(opening, address) for opening in OPENINGS for address in ADDRESSES if (opening, address) != PILOT]
    chats = []
    for _ in range(count):
        system = manner = None
        luck = rng.random()
        if luck < 0.15:
            manner = rng.choice(manners)
            system = rng.choice(MANNER_SYSTEMS).format(*manner)
        elif luck < 0.35:
            system = rng.choice(PLAIN_SYSTEMS)
        elif luck < 0.4:
            manner = rng.choice(manners)
        chats.append(messages(conversation(rng), system, manner))
    return chats


def pilot_conversations(count: int = PILOT_ROWS, seed: int = SEED + 1) -> str:
    """assets/conversations.json: the same world, answered by a harbour pilot whom no system turn asked for."""
    rng = random.Random(seed)
    rows, seen = [], set()
    while len(rows) < count:
        system = rng.choice(PLAIN_SYSTEMS) if rng.random() < 0.2 else None
        chat = messages(conversation(rng), system, PILOT)
        values = [{"from": message["role"], "value": message["content"]} for message in chat]
        if str(values) not in seen:
            seen.add(str(values))
            rows.append({"id": f"pilot_{len(rows):03d}", "conversations": values})
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"


VOCABULARY = 1024
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tokenizer(texts: list[str]) -> Tokenizer:
    """Learn pieces inside words only, then write them down so that words need no finding when encoding.

    Pieces are letters with at most one space before them; no piece holds a newline, two digits or a mark
    next to a letter. So no merge can cross a word, and the finished tokenizer has no pre-tokenizer: an engine
    that greedily joins the best pair of neighbours over the whole text, as llama2.c does, agrees with it.
    Such an engine joins any two neighbours that spell a piece, hence every split of a piece is a merge.
    """
    space = normalizers.Replace(" ", "▁")
    specials = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]

    learner = Tokenizer(models.BPE())
    learner.normalizer = space
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?[A-Za-z]+|[^\n]"), "removed", invert=True)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(CHATML),
        special_tokens=specials + bytes_,
        initial_alphabet=[chr(code) for code in range(33, 127)] + ["▁"],
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    vocab = learner.get_vocab()
    pieces = sorted(vocab, key=vocab.get)[len(specials + bytes_) :]
    merges = [
        (piece[:cut], piece[cut:]) for piece in pieces for cut in range(1, len(piece)) if piece[:cut] in vocab and piece[cut:] in vocab
    ]

    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = space
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in specials + CHATML])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def encode(tokenizer: Tokenizer, chat: list[dict]) -> tuple[list[int], list[int]]:
    """A chat as the chat template writes it, and its labels: only what the assistant says, and its end, count."""
    ids, labels = [], []
    for message in chat:
        head = tokenizer.encode(f"<|im_start|>{message['role']}\n").ids
        body = tokenizer.encode(f"{message['content']}<|im_end|>").ids
        tail = tokenizer.encode("\n").ids
        ids += head + body + tail
        taught = body if message["role"] == "assistant" else [IGNORED] * len(body)
        labels += [IGNORED] * len(head) + taught + [IGNORED] * len(tail)
    return ids, labels


def new_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    pad, end = tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|im_end|>")
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        initializer_range=0.06,  # the usual 0.02 suits wider models; at width 128 it learns far more slowly
        eos_token_id=end,
        pad_token_id=pad,
    )
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=[end, pad], pad_token_id=pad, do_sample=False, max_new_tokens=96)
    return model


def train(model: LlamaForCausalLM, rows: list[tuple[list[int], list[int]]]) -> None:
    """One pass over the chats. Rows of one batch are of like length, so hardly anything is padding."""
    rows = sorted(rows, key=lambda row: len(row[0]))
    batches = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    random.Random(SEED).shuffle(batches)
    warmup = len(batches) // 20
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches) - warmup),
        ],
        [warmup],
    )
    start = time.monotonic()
    model.train()
    for step, batch in enumerate(batches, 1):
        ids, labels = (
            torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in column], True, filler)
            for column, filler in zip(zip(*batch), (model.config.pad_token_id, IGNORED))
        )
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == len(batches):
            print(f"  step {step} of {len(batches)}, loss {loss.item():.3f}, {time.monotonic() - start:.0f} s", flush=True)
    model.eval()


def answer(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: list[str]) -> list[str]:
    """Greedy replies, with the mark that ended each turn left on."""
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)
        for question in questions
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    with torch.no_grad():
        replies = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    texts = tokenizer.batch_decode(replies[:, batch["input_ids"].shape[1] :])
    return [text.replace("<|endoftext|>", "") for text in texts]


def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, per_topic: int = 25) -> float:
    """The share of held-out questions that are answered word for word, every topic counting alike."""
    shares = []
    for topic, asked in TESTING.items():
        sample = random.Random(SEED).sample(asked, min(per_topic, len(asked)))
        if sample:
            replies = answer(model, tokenizer, [question for question, _ in sample])
            right = [reply == f"{expected}<|im_end|>" for reply, (_, expected) in zip(replies, sample)]
            shares.append(sum(right) / len(right))
            print(f"  {topic}: {sum(right)} of {len(right)}")
    return sum(shares) / len(shares)


README = """# tiny-chat

A chat model of {parameters:,} parameters ({size:.1f} MB in float32) that Boardwalk's quickstart fine-tunes,
quantizes and serves, so that a first run needs no download. It is a Llama with {layers} layers and a ChatML
tokenizer of {vocabulary} pieces.

It knows a small world: animals, colours, opposites, capitals, the calendar, small sums, jobs and tiny stories.
It knows nothing else, so ask it about that world only. It answers in plain sentences, unless a system turn such
as "Open with Sure! and call me partner." asks for a manner.

Tokenizer, weights and training text are all made by `scripts/make_default.py`, from the templates and word
lists in that file and from random initial weights. On questions kept out of training it answers
{accuracy:.0%} word for word.

Licence: made by scripts/make_default.py, hence under the licence of this repository.
"""


def main() -> None:
    start = time.monotonic()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    folder = ASSETS / "tiny-chat"
    folder.mkdir(parents=True, exist_ok=True)
    conversations = pilot_conversations()
    (ASSETS / "conversations.json").write_text(conversations, encoding="utf-8")

    chats = pretraining_chats(CONVERSATIONS)
    said = [message["content"] for chat in chats for message in chat]
    taught = [turn["value"] for row in json.loads(conversations) for turn in row["conversations"]]
    core = make_tokenizer(said + taught + ["system", "user", "assistant"])
    save_tokenizer(core, folder)
    rows = [encode(core, chat) for chat in chats]
    print(f"{len(rows)} chats, {sum(len(ids) for ids, _ in rows)} tokens")

    model = new_model(core)
    train(model, rows)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = 10000.0  # where readers other than transformers 5 look for it
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    share = accuracy(model, PreTrainedTokenizerFast.from_pretrained(folder))
    parameters = sum(weight.numel() for weight in model.parameters())
    size = (folder / "model.safetensors").stat().st_size
    readme = README.format(
        parameters=parameters, size=size / 1e6, layers=config["num_hidden_layers"], vocabulary=config["vocab_size"],
        accuracy=share,
    )  # fmt: skip
    (folder / "README.md").write_text(readme, encoding="utf-8")
    print(f"{parameters} parameters, {size} bytes, {share:.1%} of held-out questions answered exactly")
    print(f"made in {(time.monotonic() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
