"""The Chinese templates and words of our own evaluation set; see `own_set` for the notation and
`own_set_en` for the fields of a paradigm."""

WHO = "他, 她, 小明, 小红, 妈妈, 爸爸, 哥哥, 姐姐, 弟弟, 妹妹, 爷爷, 奶奶, 老师"
GROUPS = "我们, 他们, 她们, 孩子们, 同学们, 老师们, 朋友们, 工人们, 姑娘们"

# Each noun goes with the classifier before it and with no other of this list
CLASSIFIED = (
    "本/书, 本/词典, 本/小说, 本/杂志, 本/日记, 辆/汽车, 辆/卡车, 辆/出租车, 只/猫, 只/鸟, 只/兔子,"
    " 只/老虎, 只/鸭子, 条/河, 条/小河, 条/路, 条/小路, 条/街, 张/桌子, 张/书桌, 张/餐桌, 件/衣服,"
    " 件/毛衣, 件/大衣, 件/衬衫, 棵/树, 棵/松树, 棵/苹果树, 匹/马, 匹/白马, 座/山, 座/塔, 座/城市,"
    " 座/小岛, 支/铅笔, 支/钢笔, 支/毛笔, 杯/茶, 杯/牛奶, 杯/咖啡, 架/飞机, 架/钢琴,"
    " 块/石头, 块/豆腐, 封/信, 封/家信, 位/老师, 位/医生, 位/作家, 位/客人"
)
DONE = (  # object, verb with its result
    "门/关上, 窗户/打开, 衣服/洗干净, 苹果/吃完, 作业/写完, 书/放好, 信/寄走, 钱/花光, 灯/关掉,"
    " 杯子/打破, 房间/打扫干净, 车/修好, 牛奶/喝完, 椅子/搬走, 礼物/收好, 玩具/扔掉"
)
QUALITIES = "高, 胖, 累, 忙, 聪明, 努力, 着急, 高兴, 紧张, 认真, 勇敢"

PARADIGMS: dict[str, dict] = {
    # 量词与数
    "classifier_noun": {
        "phenomenon": "classifiers and numbers",
        "templates": ["{pre}{num}<{a[0]}|{b[0]}>({a[1]}|{b[1]})。"],
        "words": {
            "pre": "这里有, 那边有, 我看见了, 他画了, 照片里有, 画里有, 我梦见了",
            "num": "一, 两, 三",
            "a b": CLASSIFIED,
        },
    },
    "classifier_demonstrative": {
        "phenomenon": "classifiers and numbers",
        "templates": ["{this}<{a[0]}|{b[0]}>({a[1]}|{b[1]}){end}。"],
        "words": {
            "this": "这, 那",
            "end": "很特别, 不见了, 真奇怪, 很有意思, 让人喜欢",
            "a b": CLASSIFIED,
        },
    },
    "classifier_of_verb": {
        "phenomenon": "classifiers and numbers",
        "templates": ["{who}({a[0]}|{b[0]})了{num}<{a[1]}|{b[1]}>({a[2]}|{b[2]})。"],
        "words": {
            "who": WHO,
            "num": "一, 两, 三",
            "a b": "去/趟/北京, 去/趟/上海, 去/趟/医院, 去/趟/银行, 去/趟/超市, 吃/顿/饭,"
            " 吃/顿/火锅, 吃/顿/饺子, 读/遍/课文, 抄/遍/生词, 念/遍/古诗, 打/场/篮球, 踢/场/足球",
        },
    },
    "classifier_order": {
        "phenomenon": "classifiers and numbers",
        "templates": ["{who}{v}一<{n[0]}{adj}的|{adj}的{n[0]}>{n[1]}。"],
        "words": {
            "who": WHO,
            "v": "买了, 想要, 有, 看见了",
            "n": "件/衣服, 条/裙子, 辆/汽车, 本/词典, 张/桌子, 顶/帽子, 双/鞋, 把/雨伞, 支/笔",
            "adj": "红色, 黑色, 漂亮, 便宜, 很贵, 很大",
        },
    },
    "plural_men": {
        "phenomenon": "classifiers and numbers",
        "templates": ["{p}<们{v}{num}{q}|{v}{num}{q}们>。"],
        "words": {
            "p": "姑娘, 战士, 农民, 村民, 记者, 护士",
            "v": "看见了, 遇到了, 认识了, 帮助了, 找到了",
            "num": "两, 三, 五, 十",
            "q": "个学生, 个朋友, 个孩子, 位医生, 位老师",
        },
    },
    "er_liang": {
        "phenomenon": "classifiers and numbers",
        "templates": ["({v[0]}|{v[1]})<两|二>{n}。"],
        "words": {
            "v": "这里有/这是第, 那里有/那是第, 我看见了/我喜欢第, 他想要/他选了第,"
            " 我们需要/我们想要第",
            "n": "本书, 个人, 张票, 座山, 只猫, 件衣服, 辆车, 棵树, 间教室, 个苹果, 张桌子, 支笔,"
            " 把椅子, 条路, 封信",
        },
    },
    # 时态与体
    "guo_le": {
        "phenomenon": "aspect",
        "templates": ["{who}(从来没有{v[0]}|终于{v[1]})<过|了>{v[2]}。"],
        "words": {
            "who": WHO,
            "v": "见/见到/那位老人, 找/找到/工作, 看/看完/这本书, 学/学会/游泳, 写/写完/小说,"
            " 做/做完/这道题, 买/买到/这种票, 吃/吃到/北京烤鸭, 喝/喝到/这种茶, 穿/穿上/新衣服,"
            " 坐/坐上/飞机, 骑/骑上/马, 住/住进/新房子, 爬/爬上/这座山",
        },
    },
    "zhengzai_yijing": {
        "phenomenon": "aspect",
        "templates": ["{who}<正在|已经>{v}(呢|了)。"],
        "words": {
            "who": WHO,
            "v": "吃饭, 吃早饭, 吃午饭, 吃晚饭, 睡觉, 上课, 上班, 开会, 洗澡, 休息, 工作",
        },
    },
    "zhe_le": {
        "phenomenon": "aspect",
        "templates": ["{who}(正{v[0]}|{v[0]}完)<着|了>{v[1]}。"],
        "words": {
            "who": WHO,
            "v": "看/书, 看/电影, 看/报纸, 写/信, 写/作业, 吃/饭, 吃/苹果, 喝/茶, 喝/牛奶, 洗/衣服,"
            " 听/音乐, 做/作业, 读/课文, 包/饺子, 洗/碗",
        },
    },
    "time_and_aspect": {
        "phenomenon": "aspect",
        "templates": ["({t[0]}|{t[1]}){who}<{v[0]}了|会{v[0]}>{v[1]}。"],
        "words": {
            "t": "昨天/明天, 昨天晚上/明天晚上, 上个星期/下个星期, 上个月/下个月",
            "who": WHO,
            "v": "来/这里, 去/公园, 去/学校, 买/水果, 吃/面条, 看/电影, 写/信, 洗/衣服, 打/篮球,"
            " 包/饺子",
        },
    },
    "you_zai_again": {
        "phenomenon": "aspect",
        "templates": ["{who}({t[0]}|{t[1]})<又|再>{v}(了|吧)。"],
        "words": {
            "who": "你, 你们, 我们, 咱们, 大家",
            "t": "昨天/明天, 昨天晚上/明天晚上, 上个星期/下个星期, 前天/后天",
            "v": "来, 去, 去看电影, 去打球, 去爬山, 吃饺子, 来这里",
        },
    },
    # 否定
    "bu_mei": {
        "phenomenon": "negation",
        "templates": ["{who}<不|没>({x}|{y})。"],
        "words": {
            "who": "他, 她, 小明, 小红, 我, 我们, 他们, 我的朋友, 我的同学",
            "x": "是老师, 认识小王, 认识这个字, 知道这件事, 姓王, 会游泳, 喜欢下雨天, 爱吃鱼,"
            " 爱喝茶, 怕狗",
            "y": "有时间, 去过北京, 见过大海, 吃过螃蟹, 坐过飞机, 看过这本书,"
            " 听说过这件事, 学过画画",
        },
    },
    "bie_bu": {
        "phenomenon": "negation",
        "templates": ["({please}|{who}从来)<别|不>{v}。"],
        "words": {
            "please": "请你, 请你们, 请您, 请大家, 请同学们, 请客人们",
            "who": WHO,
            "v": "抽烟, 喝酒, 迟到, 骗人, 生气, 哭, 乱花钱, 睡懒觉, 打架, 说谎",
        },
    },
    "conglai_yijing": {
        "phenomenon": "negation",
        "templates": ["{who}<从来|已经>(没{v[0]}过{v[1]}|{v[0]}过{v[1]}了)。"],
        "words": {
            "who": WHO,
            "v": "去/北京, 见/王老师, 看/这部电影, 读/这本书, 坐/飞机, 爬/长城, 喝/这种茶,"
            " 听/这首歌, 用/这个办法, 骑/马",
        },
    },
    "yidian_bu": {
        "phenomenon": "negation",
        "templates": ["{a}(一点也|比{b})<不|更>{q}。"],
        "words": {"a b": WHO, "q": QUALITIES},
    },
    # 把字句与被字句
    "ba_order": {
        "phenomenon": "ba and bei",
        "templates": ["{who}<把{o[0]}{o[1]}|{o[1]}把{o[0]}>了。"],
        "words": {"who": WHO, "o": DONE},
    },
    "ba_verb": {
        "phenomenon": "ba and bei",
        "templates": ["{who}(把{o[0]}|很)<{o[1]}|{s}>(了|{o[0]})。"],
        "words": {
            "who": WHO,
            "s": "喜欢, 讨厌",
            "o": "这本书/看完, 这件衣服/洗好, 这首歌/唱完, 这个玩具/弄坏, 这张画/画完, 这杯茶/喝完,"
            " 那把伞/弄丢, 这个故事/讲完, 这条裙子/买下, 这个箱子/打开",
        },
    },
    "ba_negation": {
        "phenomenon": "ba and bei",
        "templates": ["{who}<没把{o[0]}|把{o[0]}没>{o[1]}。"],
        "words": {"who": WHO, "o": DONE},
    },
    "ba_bei": {
        "phenomenon": "ba and bei",
        "templates": ["({who}|{o[0]})<把|被>({o[0]}|{who}){o[1]}了。"],
        "words": {"who": WHO, "o": DONE},
    },
    "bei_order": {
        "phenomenon": "ba and bei",
        "templates": ["{o[0]}<被{who}|{who}被>{o[1]}了。"],
        "words": {"who": WHO, "o": DONE},
    },
    # 语序
    "place_order": {
        "phenomenon": "word order",
        "templates": ["{who}<在{p[0]}{p[1]}|{p[1]}在{p[0]}>。"],
        "words": {
            "who": WHO,
            "p": "图书馆/看书, 学校/上课, 家里/做饭, 公园/跑步, 医院/工作, 教室里/写作业,"
            " 食堂/吃饭, 河里/游泳, 商店/买东西, 操场/踢足球, 院子里/种花, 客厅/看电视",
        },
    },
    "time_order": {
        "phenomenon": "word order",
        "templates": ["{who}<{t}{v}|{v}{t}>。"],
        "words": {
            "who": WHO,
            "t": "明天, 下午, 晚上, 星期天, 后天",
            "v": "去北京, 看电影, 回家, 来我家, 打篮球, 去爬山, 做饭, 去学校",
        },
    },
    "adverb_order": {
        "phenomenon": "word order",
        "templates": ["{who}<{adv}{v[0]}|{v[0]}{adv}>{v[1]}。"],
        "words": {
            "who": WHO,
            "adv": "也, 常常, 总是, 经常",
            "v": "喝/茶, 吃/面条, 看/报纸, 听/音乐, 打/篮球, 写/信, 骑/自行车, 洗/衣服",
        },
    },
    "dou_order": {
        "phenomenon": "word order",
        "templates": ["{who}<都{v[0]}|{v[0]}都>{v[1]}。"],
        "words": {
            "who": GROUPS,
            "v": "喜欢/音乐, 认识/王老师, 爱/吃鱼, 有/自行车, 住在/学校, 会/游泳, 想/回家, 怕/老虎,"
            " 知道/这件事, 同意/去公园",
        },
    },
    "relative_de": {
        "phenomenon": "word order",
        "templates": ["{this}<{who}{v[0]}的|{who}的{v[0]}>{v[1]}。"],
        "words": {
            "this": "这是, 那是, 这就是",
            "who": WHO,
            "v": "做/菜, 买/书, 写/信, 写/诗, 拍/照片, 种/花, 借/词典, 送/礼物, 选/电影, 养/猫",
        },
    },
    "comparison_order": {
        "phenomenon": "comparison",
        "templates": ["{a}<{v}{b}{q}|{q}{v}{b}>。"],
        "words": {"a b": WHO, "v": "比, 没有", "q": QUALITIES},
    },
    "comparison_degree": {
        "phenomenon": "comparison",
        "templates": ["{a}比{b}<{q}{more}|{more}{q}>。"],
        "words": {"a b": WHO, "q": QUALITIES, "more": "很多, 一些, 一点"},
    },
    "bi_he": {
        "phenomenon": "comparison",
        "templates": ["{a}<比|和>{b}({q}一点|一样{q})。"],
        "words": {"a b": WHO, "q": QUALITIES},
    },
    "youdian_yidian": {
        "phenomenon": "comparison",
        "templates": ["{a}(|比{b}{q})<有点|一点>({q}|)。"],
        "words": {"a b": WHO, "q": "累, 胖, 忙, 紧张, 着急, 害羞, 粗心, 瘦, 矮, 懒"},
    },
    # 补语与“的、地、得”
    "de_possessive_complement": {
        "phenomenon": "complements",
        "templates": ["({this}{who}|{who}{v[0]})<的|得>({o}|{v[1]})。"],
        "words": {
            "this": "这是, 那是",
            "who": WHO,
            "o": "书, 衣服, 房间, 自行车, 杯子, 帽子, 照片",
            "v": "跑/很快, 睡/很晚, 起/很早, 来/很晚, 长/很高, 走/很慢, 哭/很伤心, 笑/很开心,"
            " 站/很直, 跳/很远",
        },
    },
    "de_adverb_complement": {
        "phenomenon": "complements",
        "templates": ["{who}({x[0]}|{v[0]})<地|得>({x[1]}|{v[1]})。"],
        "words": {
            "who": WHO,
            "x": "慢慢/走过来, 轻轻/关上门, 大声/喊起来, 悄悄/走开了, 认真/看书, 仔细/检查作业,"
            " 静静/坐着, 紧紧/抱住孩子",
            "v": "跑/很快, 睡/很晚, 起/很早, 来/很晚, 长/很高, 走/很慢, 说/很清楚, 唱/很好听,"
            " 做/很好, 吃/很多",
        },
    },
    "complement_order": {
        "phenomenon": "complements",
        "templates": ["{who}{v[0]}{v[1]}{v[0]}<得很{v[2]}|很{v[2]}得>。"],
        "words": {
            "who": WHO,
            "v": "唱/歌/好, 跳/舞/美, 写/字/快, 打/球/好, 说/话/慢, 做/菜/好, 开/车/快, 游/泳/快,"
            " 骑/马/稳, 走/路/慢",
        },
    },
    "potential_order": {
        "phenomenon": "complements",
        "templates": ["{who}<{v[0]}不{v[1]}|不{v[0]}{v[1]}>{v[2]}。"],
        "words": {
            "who": WHO,
            "v": "看/懂/这本书, 听/清/他的话, 找/到/钥匙, 记/住/这个名字, 看/清/黑板,"
            " 听/懂/法语, 认/出/老朋友, 学/会/游泳, 考/上/大学, 赶/上/火车, 想/起/他的名字",
        },
    },
    "resultative_order": {
        "phenomenon": "complements",
        "templates": ["{who}<{v[0]}{v[1]}|{v[1]}{v[0]}>了{v[2]}。"],
        "words": {
            "who": WHO,
            "v": "洗/干净/衣服, 写/完/作业, 吃/光/饭菜, 打/破/杯子, 听/懂/这句话, 学/会/游泳,"
            " 看/见/一只鸟, 找/到/钥匙, 关/上/门, 喝/完/牛奶, 记/住/名字, 看/完/电影",
        },
    },
    "duration_order": {
        "phenomenon": "complements",
        "templates": ["{who}<{v[0]}了{v[1]}|{v[1]}{v[0]}了>{v[2]}。"],
        "words": {
            "who": WHO,
            "v": "看/两个小时/书, 学/三年/汉语, 游/半个小时/泳, 睡/三天/觉, 等/很久/车,"
            " 开/两个小时/会, 坐/两天/火车, 听/半个小时/音乐, 教/十年/书, 练/五年/钢琴,"
            " 跑/半个小时/步, 下/两个小时/棋",
        },
    },
    "separable_verb": {
        "phenomenon": "complements",
        "templates": ["{who}{t}<{v[0]}了{v[1]}{v[2]}|{v[0]}{v[2]}了{v[1]}>。"],
        "words": {
            "who": WHO,
            "t": "昨天, 刚才, 今天",
            "v": "洗/一个/澡, 睡/一个好/觉, 跳/一支/舞, 唱/一首/歌, 照/一张/相, 吃/一顿/饭,"
            " 叹/一口/气, 打/一场/架, 开/一个/会, 做/一个/梦, 上/一节/课",
        },
    },
    "direction_and_place": {
        "phenomenon": "complements",
        "templates": ["{who}{time}要<{v[0]}{v[1]}{v[2]}|{v[0]}{v[2]}{v[1]}>。"],
        "words": {
            "who": WHO,
            "time": "现在, 今天, 明天",
            "v": "回/家/去, 回/家/来, 上/楼/去, 下/楼/来, 进/屋/来, 进/教室/去, 回/学校/去,"
            " 回/北京/去, 进/城/去, 出/门/去, 回/宿舍/来, 下/山/去, 上/山/去",
        },
    },
    "lai_qu": {
        "phenomenon": "complements",
        "templates": ["{please}(到{near}|到{far})<来|去>。"],
        "words": {
            "please": "请你, 请你们, 请大家, 让小明, 让孩子们, 叫妹妹",
            "near": "我这里, 我这儿, 我这边, 我们这里, 我们这儿",
            "far": "他那里, 他那儿, 他那边, 他们那里, 奶奶那儿, 老师那里",
        },
    },
    "reduplicated_adjective": {
        "phenomenon": "reduplication",
        "templates": ["{who}<{v[0]}{v[0]}{v[1]}{v[1]}|{v[0]}{v[1]}{v[0]}{v[1]}>地{v[2]}。"],
        "words": {
            "who": WHO,
            "v": "高/兴/回家了, 开/心/唱着歌, 认/真/写作业, 仔/细/检查了一遍, 安/静/坐着,"
            " 平/安/回来了, 老/实/坐在那里, 清/楚/说出了名字, 匆/忙/走了, 慌/张/跑了出去,"
            " 大/方/走上台, 轻/松/完成了任务",
        },
    },
    "reduplicated_verb": {
        "phenomenon": "reduplication",
        "templates": ["{who}{t}<{v[0]}{v[1]}{v[0]}{v[1]}|{v[0]}{v[0]}{v[1]}{v[1]}>吧。"],
        "words": {
            "who": "我们, 咱们, 你们, 大家, 你",
            "t": "现在, 先, 一起, 今天",
            "v": "休/息, 讨/论, 打/扫, 商/量, 练/习, 复/习, 收/拾, 锻/炼, 准/备",
        },
    },
    # 问句与连词
    "ma_ne": {
        "phenomenon": "questions and conjunctions",
        "templates": ["{who}({v[0]}|{v[1]}){v[2]}<吗|呢>？"],
        "words": {
            "who": f"你, 你们, {WHO}",
            "v": "喜欢/喜不喜欢/音乐, 喜欢/喜不喜欢/下雪, 认识/认不认识/小王, 知道/知不知道/这件事,"
            " 想/想不想/回家, 会/会不会/游泳, 是/是不是/北京人, 有/有没有/时间, 要/要不要/喝茶,"
            " 去/去不去/公园, 能/能不能/来",
        },
    },
    "wh_in_situ": {
        "phenomenon": "questions and conjunctions",
        "templates": ["{who}{t}<{v}什么|什么{v}>？"],
        "words": {
            "who": f"你, 你们, {WHO}",
            "t": "今天, 昨天, 刚才",
            "v": "买了, 说了, 做了, 听见了, 画了, 吃了, 看见了, 写了",
        },
    },
    "haishi_huozhe": {
        "phenomenon": "questions and conjunctions",
        "templates": ["{who}(是|每天){x[0]}<还是|或者>{x[1]}(呢？|。)"],
        "words": {
            "who": WHO,
            "x": "喝茶/喝咖啡, 吃面条/吃米饭, 坐车/走路, 看书/听音乐, 跑步/游泳, 唱歌/跳舞,"
            " 画画/写字, 打球/下棋",
        },
    },
    "yinwei_suiran": {
        "phenomenon": "questions and conjunctions",
        "templates": ["(因为|虽然){x[0]}，<所以|但是>{who}({x[1]}|还是{x[2]})。"],
        "words": {
            "who": WHO,
            "x": "下雨了/没去公园/去了公园, 天气很冷/没出门/出了门, 工作很忙/没来/来了,"
            " 路很远/没去/去了, 作业很多/没出去玩/出去玩了, 东西很贵/没买/买了,"
            " 题目很难/没做出来/做出来了, 身体不舒服/没来上课/来上课了",
        },
    },
    "jiu_cai": {
        "phenomenon": "questions and conjunctions",
        "templates": ["(只要|只有){x[0]}，{who}<就|才>能{x[1]}。"],
        "words": {
            "who": WHO,
            "x": "努力学习/考上大学, 多练习/学好汉语, 坐飞机/今天到北京, 吃药/好起来,"
            " 早点儿出发/赶上火车, 问老师/知道答案, 带上钥匙/打开门, 天晴/看见山顶,"
            " 写完作业/出去玩, 认真听讲/听懂",
        },
    },
    # 介词、存现与照应
    "you_zai_place": {
        "phenomenon": "prepositions and anaphors",
        "templates": ["({p}|那{n[0]}{n[1]})<有|在>(一{n[0]}{n[1]}|{p})。"],
        "words": {
            "p": "桌子上, 床上, 盒子里, 房间里, 门口, 窗台上",
            "n": "本/书, 只/猫, 把/伞, 件/衣服, 张/照片, 顶/帽子, 个/苹果, 支/笔, 个/杯子, 双/鞋",
        },
    },
    "li_cong": {
        "phenomenon": "prepositions and anaphors",
        "templates": ["({a}|{who})<离|从>{b}({far}|{back})。"],
        "words": {
            "a b": "学校, 公园, 医院, 车站, 银行, 商店, 图书馆",
            "who": WHO,
            "far": "很远, 很近, 不远",
            "back": "回来了, 出来了, 走过来了",
        },
    },
    "dui_gei": {
        "phenomenon": "prepositions and anaphors",
        "templates": ["{a}<对|给>{b}({x}|{y})。"],
        "words": {
            "a b": WHO,
            "x": "很满意, 很好, 很客气, 很热情, 很失望, 很放心",
            "y": "打电话, 写信, 买了一本书, 做了晚饭, 倒了一杯茶, 寄了一封信",
        },
    },
    "anaphor_gender": {
        "phenomenon": "prepositions and anaphors",
        "templates": ["({f}|{m}){v}<她|他>自己。"],
        "words": {
            "f": "妈妈, 奶奶, 姐姐, 妹妹, 阿姨, 女孩, 这个女人, 那位女士, 公主",
            "m": "爸爸, 爷爷, 哥哥, 弟弟, 叔叔, 男孩, 这个男人, 那位先生, 王子",
            "v": "相信, 很喜欢, 讨厌, 只关心, 不相信, 常常责怪, 总是想着, 看着镜子里的, 照顾不好,"
            " 很了解",
        },
    },
    # 形式常识
    "fact_weekday": {
        "phenomenon": "facts of form",
        "templates": [
            "星期({a[0]}|{b[0]})的后一天是星期<{a[1]}|{b[1]}>。",
            "星期({a[1]}|{b[1]})的前一天是星期<{a[0]}|{b[0]}>。",
        ],
        "words": {"a b": "一/二, 二/三, 三/四, 四/五, 五/六, 六/日, 日/一"},
    },
    "fact_month": {
        "phenomenon": "facts of form",
        "templates": [
            "({a[0]}|{b[0]})月的下一个月是<{a[1]}|{b[1]}>月。",
            "({a[1]}|{b[1]})月的上一个月是<{a[0]}|{b[0]}>月。",
        ],
        "words": {"a b": "一/二, 二/三, 三/四, 四/五, 五/六, 六/七, 七/八, 八/九, 九/十"},
    },
    "fact_counting": {
        "phenomenon": "facts of form",
        "templates": ["数数的时候，({a[0]}|{b[0]})的后面是<{a[1]}|{b[1]}>。"],
        "words": {"a b": "一/二, 二/三, 三/四, 四/五, 五/六, 六/七, 七/八, 八/九, 九/十"},
    },
    "fact_opposite": {
        "phenomenon": "facts of form",
        "templates": ["“({a[0]}|{b[0]})”的反义词是“<{a[1]}|{b[1]}>”。"],
        "words": {
            "a b": "大/小, 长/短, 多/少, 快/慢, 冷/热, 新/旧, 好/坏, 黑/白, 上/下, 左/右, 前/后,"
            " 轻/重, 早/晚, 远/近, 胖/瘦, 开/关, 真/假, 软/硬, 深/浅, 强/弱, 高/矮"
        },
    },
    "fact_zodiac": {
        "phenomenon": "facts of form",
        "templates": ["十二生肖里，({a[0]}|{b[0]})的后面是<{a[1]}|{b[1]}>。"],
        "words": {
            "a b": "鼠/牛, 牛/虎, 虎/兔, 兔/龙, 龙/蛇, 蛇/马, 马/羊, 羊/猴, 猴/鸡, 鸡/狗, 狗/猪"
        },
    },
    "fact_family": {
        "phenomenon": "facts of form",
        "templates": ["({a[0]}|{b[0]})是<{a[1]}|{b[1]}>。"],
        "words": {
            "a b": "爸爸的爸爸/爷爷, 爸爸的妈妈/奶奶, 妈妈的爸爸/外公, 妈妈的妈妈/外婆,"
            " 爸爸的弟弟/叔叔, 妈妈的弟弟/舅舅, 爸爸的姐姐/姑姑, 妈妈的姐姐/姨妈"
        },
    },
}
