"""Makes gcs/sample/pictures from an npm package: names chosen here, pictures reduced, a list and a licence beside them.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 && tar xzf lobehub-fluent-emoji-3d-1.1.0.tgz
    python gcs/sample/collect.py package/assets gcs/sample/pictures

The same package gives the same files. A name is Unicode's own (`unicodedata.name`, lower case) of the picture's single
code point; the few that a reader would not say so are renamed in `SPOKEN`.
"""

import argparse
import hashlib
import json
import sys
import unicodedata
from pathlib import Path

from PIL import Image

PACKAGE = "@lobehub/fluent-emoji-3d"
VERSION = "1.1.0"
SIDE = 128
QUALITY = 80

# Plain concrete things, one picture a concept: no faces, people, signs, flags, scenes or second pictures of the same thing.
TRAINING = """
ant, avocado, axe, badger, bagel, balloon, banana, banjo, basket, bat, beaver, bell pepper, billed cap, blowfish, blueberries,
bone, boomerang, brick, broccoli, broom, bucket, butterfly, cactus, camera, candle, carrot, castle, cat, chair, cheese wedge,
cherries, chestnut, chicken, chopsticks, coconut, coin, compass, cookie, couch and lamp, cow, crab, crocodile, croissant, crown,
cucumber, deciduous tree, deer, dodo, dog, dolphin, door, doughnut, dress, duck, eagle, corn, egg, light bulb,
elephant, evergreen tree, eyeglasses, feather, ferris wheel, fire extinguisher, fish, flamingo, french fries, game die,
garlic, goat, gorilla, grapes, green apple, green book, guitar, hamburger, hammer, handbag, hedgehog, helicopter,
high-heeled shoe, hiking boot, hippopotamus, honeybee, honey pot, hot dog, hot pepper, house building, jar, jeans, kangaroo,
key, kite, kiwifruit, koala, ladder, lady beetle, lemon, leopard, lipstick, lizard, llama, lobster, lollipop, luggage, magnet,
mango, maple leaf, microscope, mirror, motor scooter, mouse, mushroom, necktie, octopus, olive, onion, open book,
orangutan, otter, owl, palm tree, parachute, parrot, peacock, peanuts, pear, penguin, piano, pie, pig, pineapple, pizza,
potato, potted plant, pretzel, pumpkin, rabbit, raccoon, racing car, racing motorcycle, rat, red apple, rhinoceros, rocket, rooster, rose,
speedboat, sandwich, saxophone, scarf, scorpion, screwdriver, shark, sheep, shorts, shrimp, skunk, sloth, snail, snake,
socks, spider, spiral shell, spoon, squid, steam locomotive, stethoscope, strawberry, sunflower, swan, t-shirt, teapot, teddy bear, telescope,
television, test tube, tiger, tomato, tooth, toothbrush, top hat, tractor, trophy, trumpet, tulip, turkey, turtle,
umbrella, violin, volleyball, waffle, watermelon, whale, wrench, zebra
""".replace("\n", " ")
HELD_OUT = """
accordion, mantelpiece clock, ambulance, school bag, baguette bread, beetle, bicycle, bison, bus, cupcake, fire engine, hamster,
fly, fox, frog, giraffe, gloves, hibiscus, horse, ice cream, kimono, melon, microphone, monkey, orange book, ox, panda,
peach, police car, purse, razor, roller skate, running shoe, safety pin, satellite, scooter, seal, shopping trolley, tangerine, toolbox,
taxi, water buffalo, wine glass, worm
""".replace("\n", " ")
# Spoken name -> Unicode's name, where the latter is no word that a caption would hold.
SPOKEN = {
    "castle": "european castle", "corn": "ear of maize", "fox": "fox face", "frog": "frog face", "giraffe": "giraffe face",
    "hamster": "hamster face", "light bulb": "electric light bulb", "panda": "panda face", "piano": "musical keyboard",
    "pizza": "slice of pizza", "pumpkin": "jack-o-lantern", "running shoe": "athletic shoe", "school bag": "school satchel",
    "umbrella": "closed umbrella", "zebra": "zebra face",
}  # fmt: skip


def _chosen(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def collect(assets: Path, out: Path) -> dict[str, dict[str, str]]:
    """Writes the reduced pictures and names.json into `out`; returns names.json's content (file -> name, split).

    Raises:
        SystemExit: names that Unicode does not know, or the package has no single-code-point picture of, all listed.
    """
    out.mkdir(parents=True, exist_ok=True)
    listing, missing = {}, []
    for split, text in (("training", TRAINING), ("held-out", HELD_OUT)):
        for name in _chosen(text):
            try:
                code = ord(unicodedata.lookup(SPOKEN.get(name, name).upper()))
            except KeyError:
                missing.append(f"{name} (no such Unicode name)")
                continue
            files = [assets / f"{code:x}.webp", assets / f"{code:x}-fe0f.webp"]
            found = next((file for file in files if file.exists()), None)
            if found is None or code < 0x1F000:
                missing.append(f"{name} (no picture {code:x})")
                continue
            with Image.open(found) as picture:
                reduced = picture.convert("RGBA").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            reduced.save(out / f"{code:x}.webp", quality=QUALITY, method=6)
            listing[f"{code:x}.webp"] = {"name": name, "split": split}
    if missing:
        raise SystemExit("no picture for: " + ", ".join(missing))
    (out / "names.json").write_text(json.dumps(listing, indent=1, sort_keys=True) + "\n")
    return listing


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path, help="folder `assets` of the unpacked package")
    parser.add_argument("out", type=Path, help="folder to write")
    arguments = parser.parse_args()
    if not arguments.assets.is_dir():
        raise SystemExit(f"{arguments.assets} is no folder: unpack {PACKAGE} {VERSION} first (see --help)")
    listing = collect(arguments.assets, arguments.out)
    digest = hashlib.sha256((arguments.out / "names.json").read_bytes()).hexdigest()
    print(f"{len(listing)} pictures in {arguments.out}, names.json sha256 {digest[:16]}", file=sys.stderr)


if __name__ == "__main__":
    main()
