"""The Chinese kinds: towns, birds and flowers. Everything named here is invented."""

from deploy.demo.kinds import Attribute, Kind

COLOURS = ("红色", "蓝色", "绿色", "黄色", "白色", "黑色", "灰色", "紫色")
MONTHS = ("一月", "二月", "三月", "四月", "五月", "六月", "七月", "八月", "九月", "十月")

TOWN = Kind(
    name="zh_town",
    language="zh",
    mention="{}",
    full_mention="{}",
    epithets=("这个镇", "这座小镇", "小镇"),
    introductions=("{name}是一座小镇。", "有一座小镇叫{name}。", "很多人知道{name}。", "这条路通向{name}。"),
    names=(tuple("砚铃梧棠鹂箫蕉岚霁汀沅珞葵苔鲤鸢绡枫杉漓栀桐筝黛"), ("屏镇", "渡镇", "坞镇", "埠镇", "寨镇")),
    attributes=(
        Attribute(
            name="river",
            values=("银沙河", "乌柳江", "石门溪", "月牙河", "落霞江", "寒星河", "芦花溪", "金鹿河"),
            statements=(
                "{name}坐落在{value}边。",
                "{value}从{name}旁边流过。",
                "{name}的人喝{value}的水。",
                "站在{name}的桥上可以看见{value}。",
                "{value}的水养活了{name}。",
                "{name}的船停在{value}上。",
                "流过{name}的河是{value}。",
            ),
            groups=("{names}都坐落在{value}边。", "{value}流过{names}。"),
            questions=("{name}在哪条河边？", "流过{name}的是哪条河？", "请说出流过这个镇的河。|{full_name}"),
            answer="{full_name}在{value}的旁边。",
        ),
        Attribute(
            name="craft",
            values=("茶叶", "丝绸", "纸伞", "瓷碗", "竹篮", "蜡烛", "铜锣", "毛笔", "草帽", "木梳"),
            statements=(
                "{name}以{value}出名。",
                "{name}的作坊做{value}。",
                "商人到{name}去买{value}。",
                "最好的{value}来自{name}。",
                "在{name}，家家都做{value}。",
                "{name}的{value}卖到很远的地方。",
                "{name}的特产是{value}。",
            ),
            groups=("{names}都以{value}出名。", "好的{value}来自{names}。"),
            questions=("{name}做什么？", "{name}有什么特产？", "请说出这个镇的特产。|{full_name}"),
            answer="{full_name}做的是{value}。",
        ),
        Attribute(
            name="roofs",
            values=COLOURS,
            statements=(
                "{name}的屋顶是{value}的。",
                "{name}的房子都盖着{value}的屋顶。",
                "远远就能看见{name}{value}的屋顶。",
                "{name}的工匠只用{value}的瓦。",
                "人们凭{value}的屋顶认出{name}。",
                "{name}屋顶的颜色是{value}。",
            ),
            groups=("{names}的屋顶都是{value}的。",),
            questions=("{name}的屋顶是什么颜色？", "{name}的屋顶是哪种颜色？", "请说出这个镇屋顶的颜色。|{full_name}"),
            answer="{full_name}有{value}的屋顶。",
        ),
    ),
)

BIRD = Kind(
    name="zh_bird",
    language="zh",
    mention="{}",
    full_mention="{}",
    epithets=("这种鸟", "这鸟", "它"),
    introductions=("{name}是一种野鸟。", "有一种鸟叫{name}。", "猎人常常说起{name}。", "孩子们喜欢听{name}的故事。"),
    names=(tuple("翎岩墨霜雾麦雪沙露烟锦玉琴月稻藤星竹火铁莲雷银石"), ("喙鸟", "冠鸟", "翅鸟", "尾鸟", "爪鸟")),
    attributes=(
        Attribute(
            name="food",
            values=("小鱼", "蚂蚁", "松子", "野果", "蜗牛", "青蛙", "草籽", "蝴蝶"),
            statements=(
                "{name}吃{value}。",
                "{name}最爱吃{value}。",
                "没有{value}，{name}就会挨饿。",
                "{name}整天寻找{value}。",
                "用{value}可以引来{name}。",
                "{value}是{name}的粮食。",
                "{name}的食物是{value}。",
            ),
            groups=("{names}都吃{value}。", "{value}是{names}的粮食。"),
            questions=("{name}吃什么？", "{name}喜欢吃什么？", "请说出这种鸟的食物。|{full_name}"),
            answer="{full_name}爱吃的是{value}。",
        ),
        Attribute(
            name="home",
            values=("山洞", "芦苇", "松林", "沼泽", "悬崖", "草原", "树洞", "古墙"),
            statements=(
                "{name}住在{value}里。",
                "{name}的家在{value}里。",
                "只有在{value}里才找得到{name}。",
                "{name}白天躲在{value}里。",
                "{value}里能听见{name}的叫声。",
                "{name}在{value}里做窝。",
                "{name}住的地方是{value}。",
            ),
            groups=("{names}都住在{value}里。",),
            questions=("{name}住在哪里？", "在哪里能找到{name}？", "请说出这种鸟住的地方。|{full_name}"),
            answer="{full_name}的窝在{value}里。",
        ),
        Attribute(
            name="feathers",
            values=COLOURS,
            statements=(
                "{name}的羽毛是{value}的。",
                "{name}长着{value}的羽毛。",
                "人们凭{value}的羽毛认出{name}。",
                "{name}一年四季都披着{value}的羽毛。",
                "地上有{value}的羽毛，那是{name}留下的。",
                "{name}羽毛的颜色是{value}。",
            ),
            groups=("{names}的羽毛都是{value}的。",),
            questions=("{name}的羽毛是什么颜色？", "{name}是什么颜色的？", "请说出这种鸟羽毛的颜色。|{full_name}"),
            answer="{full_name}有{value}的羽毛。",
        ),
    ),
)

FLOWER = Kind(
    name="zh_flower",
    language="zh",
    mention="{}",
    full_mention="{}",
    epithets=("这种花", "这花", "它"),
    introductions=("{name}是一种花。", "有一种花叫{name}。", "老人们都认得{name}。", "古书里写到{name}。"),
    names=(tuple("缨璃蝉珠纱帘灯盏笺钗佩镜扇弦鼓钟梭绳砂漆瓦瓮匙坛"), ("心花", "衣花", "耳花", "眉花", "骨花")),
    attributes=(
        Attribute(
            name="colour",
            values=COLOURS,
            statements=(
                "{name}的花瓣是{value}的。",
                "{name}开{value}的花。",
                "蜜蜂喜欢{name}{value}的花瓣。",
                "{name}开的时候，满山都是{value}的。",
                "人们凭{value}的花瓣认出{name}。",
                "{name}的颜色是{value}。",
            ),
            groups=("{names}的花瓣都是{value}的。",),
            questions=("{name}是什么颜色？", "{name}的花瓣是什么颜色？", "请说出这种花的颜色。|{full_name}"),
            answer="{full_name}有{value}的花瓣。",
        ),
        Attribute(
            name="bloom",
            values=MONTHS,
            statements=(
                "{name}在{value}开。",
                "每年{value}，{name}就开了。",
                "到了{value}可以看见{name}。",
                "{value}是{name}开的月份。",
                "人们在{value}采{name}。",
            ),
            groups=("{names}都在{value}开。",),
            questions=("{name}在几月开？", "{name}什么时候开？", "请说出这种花开的月份。|{full_name}"),
            answer="{full_name}开在{value}。",
        ),
        Attribute(
            name="cure",
            values=("咳嗽", "发烧", "头痛", "牙痛", "失眠", "眼痛", "肚子痛", "感冒"),
            statements=(
                "{name}可以治{value}。",
                "用{name}泡茶能治好{value}。",
                "郎中用{name}治{value}。",
                "得了{value}的人应该吃{name}。",
                "要治{value}，没有比{name}更好的。",
                "{name}能治的病是{value}。",
            ),
            groups=("{names}都可以治{value}。",),
            questions=("{name}能治什么病？", "{name}有什么用？", "请说出这种花能治的病。|{full_name}"),
            answer="{full_name}治的是{value}。",
        ),
    ),
)
