"""Write the film of a run from a shell."""

from toco_core.commands import command_parser
from toco_core.train import film
from toco_core.train.film import SHOWN, read_film
from toco_core.viz.movie import captioned, write_movie


def film_command(arguments: list[str]) -> int:
    """Run `toco film`."""
    parser = command_parser("film", film.__doc__)
    parser.add_argument("run", help="folder of a run that was trained with film")
    parser.add_argument("file", help="the moving picture: .gif, or .mp4 where OpenCV can write it")
    parser.add_argument("--show", default="CAM", choices=SHOWN, help="what is laid over the images (CAM)")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each frame (0.3)")
    chosen = parser.parse_args(arguments)
    frames = read_film(chosen.run)
    pictures = [
        captioned(frames.picture(i, show=chosen.show), f"{chosen.show}, step {step}")
        for i, step in enumerate(frames.steps)
    ]
    print(write_movie(pictures, chosen.file, seconds=chosen.seconds))
    return 0
