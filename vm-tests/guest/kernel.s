# A kernel of 2 KiB that says on the first serial port what a boot loader has given to it, and resets the
# machine: its own name, the command line, and the initramfs as a text. Linux' boot protocol, 32 bit:
# Documentation/arch/x86/boot.rst.

    .code32
    .org 0x1f1
    .byte 1                     # setup_sects: this sector and one more
    .org 0x1f4
    .long (end - code) / 16     # syssize
    .org 0x1fe
    .word 0xaa55                # boot_flag
    .byte 0xeb, 0x6a            # jump
    .ascii "HdrS"
    .word 0x020c                # version
    .org 0x211
    .byte 1                     # loadflags: at 1 MiB
    .org 0x214
    .long 0x100000              # code32_start
    .org 0x22c
    .long 0x7fffffff            # initrd_addr_max
    .long 0x100000              # kernel_alignment
    .byte 1, 20                 # relocatable_kernel, min_alignment
    .org 0x238
    .long 2047                  # cmdline_size
    .org 0x258
    .quad 0x100000              # pref_address
    .long 0x100000              # init_size

    .org 0x400
code:                           # %esi: boot_params
    cli
    call here
here:
    popl %ebx
    leal name - here(%ebx), %edi
    call print
    movl 0x228(%esi), %edi      # cmd_line_ptr
    call print
    leal between - here(%ebx), %edi
    call print
    movl 0x218(%esi), %edi      # ramdisk_image
    movl 0x21c(%esi), %ecx      # ramdisk_size
byte:
    jecxz done
    movb (%edi), %al
    call put
    incl %edi
    decl %ecx
    jmp byte
done:
    leal last - here(%ebx), %edi
    call print
    movw $0xcf9, %dx
    movb $0x06, %al
    outb %al, %dx               # reset
stop:
    hlt
    jmp stop

print:                          # the text at %edi, up to its zero
    movb (%edi), %al
    testb %al, %al
    jz printed
    call put
    incl %edi
    jmp print
printed:
    ret

put:                            # %al
    movb %al, %ah
    movw $0x3fd, %dx
busy:
    inb %dx, %al
    testb $0x20, %al
    jz busy
    movw $0x3f8, %dx
    movb %ah, %al
    outb %al, %dx
    ret

name:
    .asciz "\nkernel: "
between:
    .asciz "\ninitramfs: "
last:
    .asciz "\nreset\n"
    .balign 1024
end:
