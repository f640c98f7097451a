/* The kernel's way to split its command line: next_arg() of lib/cmdline.c and the loop of parse_args()
 * around it, as a reference for immucore.cmdline.words(). */
#include <string.h>

/* lib/ctype.c: the control characters that are blanks, the space, and Latin-1's no-break space. */
static int blank(unsigned char c)
{
	return (c >= 9 && c <= 13) || c == 32 || c == 160;
}

static char *skip(char *s)
{
	while (blank(*s))
		s++;
	return s;
}

static char *next_arg(char *args, char **param, char **val)
{
	unsigned int i, equals = 0;
	int in_quote = 0, quoted = 0;

	if (*args == '"') {
		args++;
		in_quote = 1;
		quoted = 1;
	}
	for (i = 0; args[i]; i++) {
		if (blank(args[i]) && !in_quote)
			break;
		if (equals == 0 && args[i] == '=')
			equals = i;
		if (args[i] == '"')
			in_quote = !in_quote;
	}
	*param = args;
	if (!equals) {
		*val = NULL;
	} else {
		args[equals] = '\0';
		*val = args + equals + 1;
		if (**val == '"') {
			(*val)++;
			if (args[i - 1] == '"')
				args[i - 1] = '\0';
		}
	}
	if (quoted && i > 0 && args[i - 1] == '"')
		args[i - 1] = '\0';
	if (args[i]) {
		args[i] = '\0';
		args += i + 1;
	} else {
		args += i;
	}
	return skip(args);
}

/* Fill `out` with the pairs of `line`: 'K' key NUL, then 'V' value NUL or 'N'; ends with 'E'. */
void split(char *line, char *out)
{
	char *args = skip(line), *param, *val;

	while (*args) {
		args = next_arg(args, &param, &val);
		if (!val && strcmp(param, "--") == 0)
			break;
		*out++ = 'K';
		out = stpcpy(out, param) + 1;
		*out++ = val ? 'V' : 'N';
		if (val)
			out = stpcpy(out, val) + 1;
	}
	*out = 'E';
}
