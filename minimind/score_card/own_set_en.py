"""The English templates and words of our own evaluation set; see `own_set` for the notation.

A paradigm has `templates` and `words`: by the name of a slot its choices, fields separated by a
slash. Under a name of two slots ("a b"), two words are drawn that differ in every field.
"""

PEOPLE = (
    "boy/boys, girl/girls, teacher/teachers, doctor/doctors, farmer/farmers, king/kings,"
    " friend/friends, sister/sisters, brother/brothers, student/students"
)
ANIMALS = (
    "dog/dogs, cat/cats, bird/birds, horse/horses, rabbit/rabbits, duck/ducks, cow/cows, pig/pigs,"
    " bear/bears, lion/lions"
)
THINGS = (
    "book/books, ball/balls, box/boxes, cup/cups, chair/chairs, hat/hats, flower/flowers, toy/toys,"
    " bag/bags, letter/letters, picture/pictures, key/keys, coat/coats, stone/stones, boat/boats"
)
LIVING = f"{PEOPLE}, {ANIMALS}"
NAMES = "Tom, Anna, Peter, Lucy, Jack, Mary, Sam, Emma, Ben, Sarah"
WHO = (
    f"{NAMES}, the boy, the girl, my brother, my sister, the old man, the teacher, the farmer,"
    " our friend"
)
STATES = "happy, hungry, tired, small, quiet, old, young, sad, strong, afraid"
PLACES = "in the garden, at school, in the park, near the river, in the house, on the farm"
MASSES = "milk, water, money, bread, rice, sugar, tea, food, snow, salt"
ACTIONS = (  # base form, -ing form, rest
    "swim/swimming/in the river, sing/singing/a song, read/reading/a book, run/running/to school,"
    " play/playing/with the dog, write/writing/a letter, cook/cooking/some rice,"
    " dance/dancing/in the room, ride/riding/a horse, climb/climbing/a tree,"
    " clean/cleaning/the house, drive/driving/the car, carry/carrying/the box,"
    " paint/painting/the door, eat/eating/an apple"
)
PARTICIPLES = (  # past form, participle, rest
    "wrote/written/a long letter, ate/eaten/the whole cake, saw/seen/a big ship,"
    " took/taken/the wrong bag, gave/given/the dog a bone, broke/broken/the blue cup,"
    " forgot/forgotten/the key, chose/chosen/a red dress, drew/drawn/a little house,"
    " went/gone/to the market, spoke/spoken/to the doctor, drove/driven/to the sea,"
    " rode/ridden/a white horse, hid/hidden/the gold ring, wore/worn/a warm coat,"
    " threw/thrown/a stone, knew/known/the truth, fell/fallen/into the water,"
    " shook/shaken/the tree, grew/grown/some roses"
)
COMPARED = (
    "big/bigger/biggest, small/smaller/smallest, old/older/oldest, young/younger/youngest,"
    " fast/faster/fastest, slow/slower/slowest, strong/stronger/strongest, tall/taller/tallest,"
    " happy/happier/happiest, heavy/heavier/heaviest"
)

SUBJECT_VERB_AGREEMENT: dict[str, dict] = {
    "subject_verb": {
        "templates": ["The ({s[0]}|{s[1]}) <{v[1]}|{v[0]}> {end}."],
        "words": {
            "s": LIVING,
            "v": "run/runs, sleep/sleeps, eat/eats, play/plays, walk/walks, rest/rests",
            "end": f"every day, in the morning, at night, in the sun, {PLACES}",
        },
    },
    "subject_auxiliary": {
        "templates": [
            "The ({s[0]}|{s[1]}) <is|are> very {adj}.",
            "The ({s[0]}|{s[1]}) <was|were> very {adj}.",
            "The ({s[0]}|{s[1]}) <has|have> been {adj} all day.",
        ],
        "words": {"s": LIVING, "adj": STATES},
    },
    "subject_verb_distractor": {
        "templates": [
            "The ({s[0]}|{s[1]}) near the ({t[1]}|{t[0]}) <is|are> {adj}.",
            "The ({s[0]}|{s[1]}) behind the ({t[1]}|{t[0]}) <was|were> {adj}.",
        ],
        "words": {
            "s": LIVING,
            "t": "tree/trees, house/houses, car/cars, boat/boats, door/doors, wall/walls,"
            " table/tables",
            "adj": STATES,
        },
    },
    "subject_verb_relative": {
        "templates": [
            "The ({a[0]}|{a[1]}) that {v} the ({b[1]}|{b[0]}) <is|are> {adj}.",
            "The ({a[0]}|{a[1]}) that {v} the ({b[1]}|{b[0]}) <was|were> {adj}.",
        ],
        "words": {"a b": LIVING, "v": "saw, liked, followed, found, heard", "adj": STATES},
    },
    "there_be": {
        "templates": [
            "There <is|are> (a {t[0]}|two {t[1]}) {place}.",
            "There <was|were> (a {t[0]}|many {t[1]}) {place}.",
        ],
        "words": {"t": f"{ANIMALS}, {THINGS}", "place": PLACES},
    },
}

DETERMINER_NOUN_AGREEMENT: dict[str, dict] = {
    "demonstrative_noun": {
        "templates": [
            "{who} {v} <this|these> ({t[0]}|{t[1]}).",
            "{who} {v} <that|those> ({t[0]}|{t[1]}).",
        ],
        "words": {"who": WHO, "v": "likes, wants, bought, took", "t": THINGS},
    },
    "demonstrative_adjective_noun": {
        "templates": [
            "{who} {v} <this|these> {adj} ({t[0]}|{t[1]}).",
            "{who} {v} <that|those> {adj} ({t[0]}|{t[1]}).",
        ],
        "words": {
            "who": WHO,
            "v": "likes, wants, bought, took",
            "adj": "red, new, big, little, old, beautiful",
            "t": THINGS,
        },
    },
    "number_noun": {
        "templates": [
            "{who} {v} (one|{many}) <{t[0]}|{t[1]}>.",
            "{who} {v} (one|{many}) {adj} <{t[0]}|{t[1]}>.",
        ],
        "words": {
            "who": WHO,
            "v": "has, found, bought, lost",
            "many": "two, three, four, five, many",
            "adj": "red, new, big, little, old",
            "t": THINGS,
        },
    },
}

QUANTIFIERS: dict[str, dict] = {
    "quantifier_number": {
        "templates": ["<{q[0]}|{q[1]}> ({s[0]}|{s[1]}) {did}."],
        "words": {
            "q": "Every/All, Each/Both, Every/Many, Each/Several",
            "s": LIVING,
            "did": "went home, ate some bread, slept well, came to us, sat down, ran away",
        },
    },
    "much_many": {
        "templates": [
            "How <much|many> ({m}|{t[1]}) do you {v}?",
            "{who} does not have <much|many> ({m}|{t[1]}).",
            "{who} has too <much|many> ({m}|{t[1]}).",
        ],
        "words": {"who": WHO, "m": MASSES, "t": THINGS, "v": "want, need, have, see"},
    },
    "a_an": {
        "templates": ["{who} {v} <a|an> ({c}|{vowel})."],
        "words": {
            "who": WHO,
            "v": "saw, found, wants, drew",
            "c": "dog, book, ball, cat, boat, horse, flower, tree, pear, small bird, big house",
            "vowel": "apple, egg, orange, elephant, ant, island, onion, owl, eagle, old ship,"
            " empty box",
        },
    },
}

ANAPHORS_AND_PRONOUNS: dict[str, dict] = {
    "anaphor_gender": {
        "templates": ["({f}|{m}) {v[0]} <herself|himself> {v[1]}."],
        "words": {
            "f": "Anna, Lucy, Mary, the girl, the queen, my mother, my sister, the woman, my aunt",
            "m": "Tom, Peter, Jack, the boy, the king, my father, my brother, the man, my uncle",
            "v": "hurt/on the stairs, saw/in the mirror, looked at/in the water, bought/a new hat,"
            " made/a cup of tea, talked to/all day, hid/behind the door, asked/the same question,"
            " washed/in the river, was proud of/that day",
        },
    },
    "anaphor_number": {
        "templates": ["({s[0]}|{s[1]}) {v[0]} <{s[2]}|themselves> {v[1]}."],
        "words": {
            "s": "the boy/the boys/himself, the girl/the girls/herself, the king/the kings/himself,"
            " my brother/my brothers/himself, my sister/my sisters/herself,"
            " the man/the men/himself, the woman/the women/herself",
            "v": "hurt/on the stairs, saw/in the mirror, looked at/in the water, bought/a new hat,"
            " made/a cup of tea, talked to/all day, hid/behind the door, asked/the same question,"
            " washed/in the river",
        },
    },
    "pronoun_case": {
        "templates": ["({start} that|{verb}) <{p[0]}|{p[1]}> ({end}|{time})."],
        "words": {
            "start": "I know, mother said, Tom thought, the king heard, Anna hopes",
            "end": "can swim well, must go now, went home, came too late, had no money, slept well",
            "verb": "the dog likes, I will help, Anna is waiting for, father looked at,"
            " the teacher spoke to, nobody heard",
            "time": "again, today, too",
            "p": "he/him, she/her, they/them, we/us",
        },
    },
    "possessive_form": {
        "templates": [
            "(This {t[0]} is|This is) <{p[1]}|{p[0]}>(| {t[0]}).",
            "(That {t[0]} was|That was) <{p[1]}|{p[0]}>(| {t[0]}).",
        ],
        "words": {"t": THINGS, "p": "my/mine, your/yours, her/hers, our/ours, their/theirs"},
    },
    "relative_pronoun": {
        "templates": ["The ({s[0]}|{t[0]}) <who|which> {rest} was very {adj}."],
        "words": {
            "s": PEOPLE,
            "t": THINGS,
            "rest": "we saw yesterday, Tom talked about, came from the city, Anna liked most,"
            " was in the room",
            "adj": "old, small, beautiful, strange",
        },
    },
}

VERB_FORMS: dict[str, dict] = {
    "past_participle": {
        "templates": ["{who}(| has) <{v[0]}|{v[1]}> {v[2]}."],
        "words": {"who": WHO, "v": PARTICIPLES},
    },
    "modal_progressive": {
        "templates": ["{who} ({aux[0]}|{aux[1]}) <{v[0]}|{v[1]}> {v[2]}."],
        "words": {
            "who": WHO,
            "aux": "can/is, will/was, must/is, could/was, should/is",
            "v": ACTIONS,
        },
    },
    "did_has": {
        "templates": [
            "{who} (did|has) not <{v[0]}|{v[1]}> {v[2]}.",
            "(Did|Has) {who} <{v[0]}|{v[1]}> {v[2]}?",
        ],
        "words": {
            "who": WHO,
            "v": "see/seen/the moon, eat/eaten/the bread, write/written/the letter,"
            " take/taken/the bus, go/gone/home, give/given/you the key, speak/spoken/to the king,"
            " break/broken/the window, forget/forgotten/the name, do/done/the work,"
            " choose/chosen/a hat, drive/driven/the car, wear/worn/the new shoes",
        },
    },
    "infinitive_gerund": {
        "templates": ["{who} ({verb[0]} to|{verb[1]}) <{v[0]}|{v[1]}> {v[2]}."],
        "words": {
            "who": WHO,
            "verb": "wants/enjoys, has/stopped, decided/kept, hopes/is good at, needs/loves",
            "v": ACTIONS,
        },
    },
    "tense_and_time": {
        "templates": [
            "{who} <did|will> not {do} ({past}|{future}).",
            "<Did|Will> {who} {do} ({past}|{future})?",
        ],
        "words": {
            "who": WHO,
            "past": "yesterday, last week, last year, two days ago",
            "future": "tomorrow, next week, next year",
            "do": "come, go home, play, sing, work, go to school, visit us, eat with us",
        },
    },
}

NEGATION: dict[str, dict] = {
    "ever_never": {
        "templates": [
            "{who} (has not|has) <ever|never> {done}.",
            "{who} (hasn't|has) <ever|never> {done}.",
        ],
        "words": {
            "who": WHO,
            "done": "seen the sea, been to London, eaten an orange, read this book, had a dog,"
            " ridden a horse, climbed a mountain, heard this song, driven a car, told a lie",
        },
    },
    "any_no": {
        "templates": [
            "There (is not|is) <any|no> {m} {place}.",
            "{who} (does not have|has) <any|no> {m}.",
            "{who} ({v[0]}|{v[1]}) <{n[0]}|{n[1]}> {place}.",
        ],
        "words": {
            "who": WHO,
            "m": MASSES,
            "v": "did not see/saw, did not find/found, did not hear/heard",
            "n": "anything/nothing, anybody/nobody",
            "place": PLACES,
        },
    },
    "too_either": {
        "templates": ["{a} ({v[0]}|{v[1]}) {food}, and {b} ({v[0]}|{v[1]}) it <too|either>."],
        "words": {
            "a b": NAMES,
            "v": "likes/does not like, wants/does not want, liked/did not like",
            "food": "fish, milk, cheese, bread, rice, soup, tea, sugar",
        },
    },
}

WORD_ORDER: dict[str, dict] = {
    "adverb_order": {
        "templates": ["{who} <{adv} {v[0]}|{v[0]} {adv}> {v[1]}."],
        "words": {
            "who": WHO,
            "adv": "often, always, never, usually",
            "v": "reads/books, drinks/milk, eats/apples, plays/football, writes/letters,"
            " sings/songs, cleans/the house, tells/stories, buys/bread, helps/the old woman",
        },
    },
    "question_order": {
        "templates": [
            "(Where|{know} where) <is {x}|{x} is>(?|.)",
            "(Where|{know} where) <was {x}|{x} was>(?|.)",
        ],
        "words": {
            "know": "I know, Tom knows, nobody knows, we forgot, she remembers",
            "x": "the cat, my bag, the key, the old man, the teacher, your brother, the ball,"
            " the station, the letter, our house, the dog, the money, your friend, the doctor,"
            " my hat, her mother, the school, the red car",
        },
    },
    "do_question_order": {
        "templates": ["{q[0]} <did {who}|{who} did> {q[1]}?"],
        "words": {
            "who": WHO,
            "q": "why/cry, why/laugh, why/run away, where/sleep, where/go, when/come home,"
            " how/know that, what/say, what/want, what/find, when/get up, where/live",
        },
    },
    "adjective_order": {
        "templates": ["{who} {v} a <{size} {colour}|{colour} {size}> {t[0]}."],
        "words": {
            "who": WHO,
            "v": "saw, found, wants, has",
            "size": "big, small, little, beautiful, nice",
            "colour": "red, blue, green, black, white, yellow, brown",
            "t": THINGS,
        },
    },
    "noun_order": {
        "templates": ["{who} {v} a <{adj} {t[0]}|{t[0]} {adj}>."],
        "words": {
            "who": WHO,
            "v": "has, wants, likes, needs",
            "adj": "new, big, small, little, beautiful, nice, red, strange",
            "t": THINGS,
        },
    },
}

ARGUMENT_STRUCTURE: dict[str, dict] = {
    "double_object": {
        "templates": ["{who} {v} <{p} {o}|{o} {p}>."],
        "words": {
            "who": NAMES,
            "v": "gave, showed, sent, brought, bought",
            "p": "the boy, the girl, the children, the teacher, the old man, the king, our friend",
            "o": "a book, a cake, an apple, a flower, a picture, a new hat, some milk, two eggs",
        },
    },
    "transitivity": {
        "templates": ["{who} <{iv}|{tv}> ({place}|{o})."],
        "words": {
            "who": NAMES,
            "iv": "slept, smiled, fell, arrived, waited, laughed",
            "tv": "found, took, wanted, bought, brought, held",
            "place": PLACES,
            "o": "the ball, a book, the key, a flower, the money, a cup, the bag",
        },
    },
    "what_that": {
        "templates": ["{know} <what|that> {who} {tv}(| {o})."],
        "words": {
            "know": "I know, she knows, we heard, they remember, nobody knows",
            "who": NAMES,
            "tv": "found, took, wanted, bought, brought, made, needed",
            "o": "the ball, a book, a box, a flower, a cup, the bag, a toy",
        },
    },
    "adjective_adverb": {
        "templates": ["{who} (was|{v}) very <{adj[0]}|{adj[1]}>."],
        "words": {
            "who": WHO,
            "v": "spoke, sang, answered",
            "adj": "sad/sadly, happy/happily, angry/angrily, quiet/quietly, careful/carefully,"
            " polite/politely, brave/bravely, rude/rudely, clever/cleverly",
        },
    },
}

COMPARISON: dict[str, dict] = {
    "comparative": {
        "templates": ["{a} is(| as) <{adj[1]}|{adj[0]}> (than|as) {b}."],
        "words": {
            "a b": f"{NAMES}, the dog, the cat, the horse, my brother, my sister, the bear",
            "adj": COMPARED,
        },
    },
    "superlative": {
        "templates": ["{who} is(| the) <{adj[1]}|{adj[2]}> (than|of) all the {s}."],
        "words": {
            "who": NAMES,
            "adj": COMPARED,
            "s": "students, children, players, singers, dancers, runners",
        },
    },
}

PREPOSITIONS_AND_CONJUNCTIONS: dict[str, dict] = {
    "time_preposition": {
        "templates": ["{who} {v} <{a[0]}|{b[0]}> ({a[1]}|{b[1]})."],
        "words": {
            "who": WHO,
            "v": "came home, went to the city, left, called us, will visit us, will come back",
            "a b": "on/Monday, on/Tuesday, on/Friday, on/Sunday, in/January, in/May, in/August,"
            " in/summer, in/winter, in/spring, at/noon, at/midnight, at/six o'clock, at/night",
        },
    },
    "paired_conjunctions": {
        "templates": [
            "{who} can have <either|both> {a} (or|and) {b}.",
            "{who} had <neither|both> {a} (nor|and) {b}.",
        ],
        "words": {
            "who": WHO,
            "a b": "the apple, the cake, the book, the ball, the hat, the picture, the bread",
        },
    },
    "tag_question": {
        "templates": ["{s[0]} ({a[0]} {a[1]}|{b[0]} {b[1]}), <{a[2]}|{b[2]}> {s[1]}?"],
        "words": {
            "s": "Tom/he, Peter/he, Jack/he, Anna/she, Lucy/she, Mary/she",
            "a b": "can/swim/can't, can/sing/can't, is/tired/isn't, is/at home/isn't,"
            " was/late/wasn't, was/ill/wasn't, will/come/won't, will/help us/won't,"
            " should/go/shouldn't, should/wait/shouldn't",
        },
    },
}

FACTS_OF_FORM: dict[str, dict] = {
    "fact_day": {
        "templates": [
            "The day after ({a[0]}|{b[0]}) is <{a[1]}|{b[1]}>.",
            "The day before ({a[1]}|{b[1]}) is <{a[0]}|{b[0]}>.",
        ],
        "words": {
            "a b": "Monday/Tuesday, Tuesday/Wednesday, Wednesday/Thursday, Thursday/Friday,"
            " Friday/Saturday, Saturday/Sunday, Sunday/Monday"
        },
    },
    "fact_month": {
        "templates": [
            "The month after ({a[0]}|{b[0]}) is <{a[1]}|{b[1]}>.",
            "The month before ({a[1]}|{b[1]}) is <{a[0]}|{b[0]}>.",
        ],
        "words": {
            "a b": "January/February, February/March, March/April, April/May, May/June, June/July,"
            " July/August, August/September, September/October, October/November,"
            " November/December"
        },
    },
    "fact_counting": {
        "templates": ["The number after ({a[0]}|{b[0]}) is <{a[1]}|{b[1]}>."],
        "words": {
            "a b": "one/two, two/three, three/four, four/five, five/six, six/seven, seven/eight,"
            " eight/nine, nine/ten, ten/eleven, eleven/twelve"
        },
    },
    "fact_opposite": {
        "templates": ["The opposite of ({a[0]}|{b[0]}) is <{a[1]}|{b[1]}>."],
        "words": {
            "a b": "big/small, hot/cold, up/down, day/night, good/bad, black/white, open/closed,"
            " left/right, wet/dry, fast/slow, happy/sad, rich/poor, full/empty, long/short,"
            " hard/soft, early/late, high/low, strong/weak, clean/dirty, first/last"
        },
    },
    "fact_plural": {
        "templates": ["There was one ({a[0]}|{b[0]}), and then there were two <{a[1]}|{b[1]}>."],
        "words": {
            "a b": "foot/feet, mouse/mice, child/children, man/men, woman/women, tooth/teeth,"
            " goose/geese, leaf/leaves, wolf/wolves, knife/knives, baby/babies, city/cities,"
            " story/stories"
        },
    },
    "fact_past": {
        "templates": ["The past tense of ({a[0]}|{b[0]}) is <{a[1]}|{b[1]}>."],
        "words": {
            "a b": "go/went, eat/ate, run/ran, come/came, sing/sang, sleep/slept, write/wrote,"
            " drink/drank, swim/swam, fly/flew, fall/fell, see/saw, sit/sat, think/thought,"
            " speak/spoke, win/won, buy/bought, take/took, give/gave, know/knew"
        },
    },
    "fact_young": {
        "templates": ["A young ({a[0]}|{b[0]}) is called a <{a[1]}|{b[1]}>."],
        "words": {
            "a b": "dog/puppy, cat/kitten, cow/calf, sheep/lamb, horse/foal, duck/duckling,"
            " pig/piglet, bear/cub, frog/tadpole, hen/chick"
        },
    },
    "fact_letter": {
        "templates": ["The letter after ({a[0]}|{b[0]}) is <{a[1]}|{b[1]}>."],
        "words": {
            "a b": "A/B, B/C, C/D, D/E, E/F, F/G, G/H, H/I, I/J, J/K, K/L, L/M, M/N, N/O, O/P, P/Q,"
            " Q/R, R/S, S/T, T/U, U/V, V/W, W/X, X/Y, Y/Z"
        },
    },
}

PARADIGMS: dict[str, dict[str, dict]] = {
    "subject-verb agreement": SUBJECT_VERB_AGREEMENT,
    "determiner-noun agreement": DETERMINER_NOUN_AGREEMENT,
    "quantifiers": QUANTIFIERS,
    "anaphors and pronouns": ANAPHORS_AND_PRONOUNS,
    "verb forms": VERB_FORMS,
    "negation": NEGATION,
    "word order": WORD_ORDER,
    "argument structure": ARGUMENT_STRUCTURE,
    "comparison": COMPARISON,
    "prepositions and conjunctions": PREPOSITIONS_AND_CONJUNCTIONS,
    "facts of form": FACTS_OF_FORM,
}
