"""Documents of made-up sentences in Chinese and English: no two sentences of a corpus are likely to be the same."""

import random

CHINESE = (
    ("清晨", "傍晚", "去年冬天", "雨停以后", "开会之前", "过年的时候", "第二天", "放学以后", "秋收时节", "夜里"),
    ("老王", "村里的木匠", "我的表姐", "几位邻居", "新来的老师", "两个孩子", "县里的医生", "那位诗人",
     "售票员", "工人们"),
    ("在河边", "在院子里", "在车站", "在图书馆", "在山脚下", "在厨房", "在集市上", "在教室", "在窗前", "在桥头"),
    ("慢慢地修理", "高兴地谈起", "仔细地检查", "匆忙地收拾", "悄悄地画着", "认真地讨论", "反复地阅读", "一起搬运"),
    ("那只旧木船", "明年的计划", "邻居家的猫", "一封长信", "村子的历史", "刚买的自行车", "三本旧书", "祖父的照片"),
    ("，后来大家都笑了。", "，谁也没有说话。", "，直到天黑才回家。", "，这是很久以前的事了。",
     "，因为天气非常好。", "，可是没有人相信。"),
)  # fmt: skip
ENGLISH = (
    ("Early in the morning", "After the rain", "Last winter", "Before the meeting", "On the second day", "At noon",
     "When the harvest was in", "In the old days", "During the holidays", "Late at night"),
    (" the carpenter", " my cousin", " a few neighbours", " the new teacher", " two of the children", " the doctor",
     " an old sailor", " the conductor", " the baker's wife", " a group of workers"),
    (" slowly repaired", " talked about", " carefully looked at", " quietly drew", " often read about", " carried away",
     " wrote a letter about", " could not forget"),
    (" the wooden boat", " the plan for the next year", " the cat of the house", " the history of the village",
     " the new bicycle", " three books", " the photograph of his father", " the broken clock"),
    (" by the river", " in the garden", " at the station", " in the library", " at the foot of the hill",
     " in the kitchen", " on the market", " near the bridge"),
    (", and all of them laughed.", ", and nobody said a word.", ", until it was dark.", ", which was long ago.",
     ", because the weather was fine.", ", but nobody believed it."),
)  # fmt: skip


def documents(count, sentences=14, seed=0):
    """Rows of `stages.COLUMNS`: `count` of each language, in paragraphs."""
    generator = random.Random(seed)
    rows = []
    for source, language, parts in (("stories", "zh", CHINESE), ("tales", "en", ENGLISH)):
        for i in range(count):
            made = ["".join(generator.choice(part) for part in parts) for _ in range(sentences)]
            gap = "" if language == "zh" else " "
            text = "\n".join(gap.join(made[j : j + 4]) for j in range(0, sentences, 4))
            rows.append((f"{source}/{i:08d}", source, language, "text", "made up", text))
    return rows


def items(count, seed=1):
    """Evaluation items: a long question and a short answer in each."""
    generator = random.Random(seed)
    rows = []
    for i in range(count):
        noun = "".join(generator.choice("bcdfgklmnprst") + generator.choice("aeiou") for _ in range(4))
        rows.append(
            f"Which of these {noun} plants grows {generator.randrange(9, 99)} {noun[:4]} hands above its own "
            f"{noun[2:]} roots in a dry summer of year {1000 + i}?\nThe {noun}."
        )
    return rows
